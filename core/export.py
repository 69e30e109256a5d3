"""A trained network as one file for other programs, which need nothing of this project: torch.export or ONNX."""

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.export import ExportedProgram

from core import predict
from core.compile.isolation import isolated
from core.data import datasets
from core.errors import UserError
from core.predict import Network
from core.store import atomic_write, local, reserve

COUNT = 100  # images to check a file with
# Largest difference of a logit, relative to the largest logit if that is above 1. Another program adds in another
# order, and of a logit of 40, float32 has no more than six digits.
TOLERANCE = 1e-5

Model = Callable[[Tensor], Tensor]  # images, uint8 [n, *shape] -> logits, float32 [n, classes]


class ExportError(UserError):
    """A network cannot be exported; the message says what is missing or wrong."""


class Classifier(nn.Sequential):
    """A network as the module that is exported: a `Model`. Its tensors have the names that the checkpoint has."""

    def __init__(self, network: Network) -> None:
        with torch.random.fork_rng(devices=[]):  # the weights that torch draws for the modules are replaced below
            super().__init__(*predict.as_module(network.spec, network.info))
        self.load_state_dict(network.params | network.stats)
        self.network = network
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        params: dict[str, Tensor] = dict(self.named_parameters())
        return self.network._replace(params=params, stats=dict(self.named_buffers())).logits(images)


def torch_bytes(program: ExportedProgram, classes: str) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"classes.json": classes})
    return file.getvalue()


def torch_model(path: Path) -> Model:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def onnx_bytes(program: ExportedProgram, classes: str) -> bytes:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "n"},),
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    model.metadata_props.add(key="classes", value=classes)
    return model.SerializeToString()


def onnx_model(path: Path) -> Model:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


class Exported(NamedTuple):
    """The network in a file.

    Attributes:
        precision: of its matrix products; float32 if the format does not support that of the checkpoint.
        largest: the largest absolute logit of the check. TOLERANCE is relative to it if it is above 1.
    """

    precision: str
    largest: float


class Format(NamedTuple):
    """A format of files.

    Attributes:
        suffix: of their names.
        needs: the packages that write and check them.
        encode: the content of the file, with the names of the classes as a JSON list. read: the model in a file.
        bfloat16: whether its matrix products can be in bfloat16; otherwise they are in float32.
        limit: how many bytes of weights it holds.
    """

    suffix: str
    needs: tuple[str, ...]
    encode: Callable[[ExportedProgram, str], bytes]
    read: Callable[[Path], Model]
    bfloat16: bool
    limit: int


FORMATS = {
    "torch": Format(".pt2", (), torch_bytes, torch_model, True, 1 << 40),
    # On a CPU onnxruntime has no products in bfloat16, and a protocol buffer has less than 2 GiB.
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), onnx_bytes, onnx_model, False, 2_000_000_000),
}


def check_images(network: Network, folder: Path) -> tuple[Tensor, str]:
    """Images to check a file with, uint8 [COUNT, *shape], and their description: the first test images if they are in
    `folder`, else random images."""
    name, shape = network.about.spec["dataset"], network.info.shape
    known = datasets.REGISTRY.get(name)  # a folder of images is not in it
    if known is None or known.missing(where := datasets.home(name, folder)):
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (COUNT, *shape), generator=generator, dtype=torch.uint8, device="cpu")
        return images, f"{COUNT} random images"
    images = torch.from_numpy(known.test_images(where)[:COUNT])
    return images.view(-1, *shape), f"{COUNT} test images"


@isolated()
def export(network: Network, kind: str, path: str | Path, images: Tensor) -> Exported:
    """Write a network, whose weights are on the CPU, as a file that takes any number of images and normalises them.

    The file replaces `path` only after it was read again and gave the same logits, for one image alone and for the
    others together.

    Args:
        kind: one of FORMATS.
        images: to check it with, uint8 [n, *shape].

    Raises:
        ExportError: a package is missing, or the file would not be right.
        core.store.StoreError: it cannot be written.
    """
    form, path = FORMATS[kind], local(path)
    if missing := [name for name in form.needs if importlib.util.find_spec(name) is None]:
        command = f"`uv run --group {kind} main.py export CHECKPOINT --format {kind}`"
        raise ExportError(f"the format {kind} needs {', '.join(missing)}, not installed here; {command} installs them")
    if path.suffix != form.suffix:
        raise ExportError(f"cannot write {path}: expected a name that ends in {form.suffix}")
    size = sum(t.nbytes for t in network.params.values())
    if size > form.limit:
        raise ExportError(f"cannot write {path}: {size:,} bytes of weights, expected at most {form.limit:,} in {kind}")
    reserve(path, size, 1)
    if network.spec["precision"] != "bfloat16" or not form.bfloat16:  # tf32 is a mode of a device, not of a network
        network = network._replace(about=replace(network.about, spec={**network.spec, "precision": "float32"}))

    parts = images[:1], images[1:]
    expected = torch.cat([network(part) for part in parts])
    largest = expected.abs().max().item()

    def check(written: Path) -> None:
        model, allowed = form.read(written), TOLERANCE * max(1.0, largest)
        difference = (torch.cat([model(part) for part in parts]) - expected).abs().max().item()
        if not difference <= allowed:  # NaN, too, is refused
            raise ExportError(
                f"{path} is not written: its logits differ by {difference:.1e} from those of the checkpoint, "
                f"expected at most {allowed:.1e}"
            )

    example, shapes = torch.zeros(2, *network.info.shape, dtype=torch.uint8), ({0: torch.export.Dim("n")},)
    program = torch.export.export(Classifier(network), (example,), dynamic_shapes=shapes)
    atomic_write(path, form.encode(program, json.dumps(network.info.classes)), check=check)
    return Exported(network.spec["precision"], largest)
