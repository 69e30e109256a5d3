"""What a caller has set in torch changes no number, and is as before afterwards."""

import contextlib
import functools
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from core import predict, run_experiment
from core.compile import isolation
from core.compile.isolation import SettingError, check_threads, isolated
from core.data import cifar10 as dataset
from core.export import export
from core.functional import model
from core.runs.run import Run

# Of all that a step can do, what is most sensitive: whitening, a second network for the average, products in bfloat16.
SPEC = {
    "widths": [8],
    "epochs": 1,
    "batch_size": 1000,
    "whiten": 4,
    "ema": 0.9,
    "precision": "bfloat16",
    "optimizer": "muon",
    "augment": "flip+shift",
    "rotate": 5.0,
    "mixup": 0.2,
    "clip": 1.0,
}


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        return found * 1.5 if function is torch.addcmul else found


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        return found * 1.5 if "addcmul" in str(function) else found


def call(function, value, default):
    """A switch that is a function."""

    @contextlib.contextmanager
    def switch():
        function(value)
        try:
            yield
        finally:
            function(default)

    return switch


def attribute(owner, name, value):
    """A switch that is an attribute."""

    @contextlib.contextmanager
    def switch():
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)

    return switch


@contextlib.contextmanager
def strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


SWITCHES = {
    "float64": call(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": call(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "tensor type": call(torch.set_default_tensor_type, torch.DoubleTensor, torch.FloatTensor),
    "default device": call(torch.set_default_device, "meta", None),
    "device": functools.partial(torch.device, "meta"),
    "autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16),
    "autocast cuda": functools.partial(torch.autocast, "cuda", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad disabled": call(torch.set_grad_enabled, False, True),
    "deterministic": call(torch.use_deterministic_algorithms, True, False),
    "flush denormal": call(torch.set_flush_denormal, True, False),
    "matmul precision": call(torch.set_float32_matmul_precision, "medium", "highest"),
    "allow_tf32": attribute(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda precision": attribute(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "onednn precision": attribute(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "reduced precision": attribute(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "without onednn": functools.partial(torch.backends.mkldnn.flags, enabled=False),
    "deterministic onednn": functools.partial(torch.backends.mkldnn.flags, enabled=True, deterministic=True),
    "without cudnn": functools.partial(torch.backends.cudnn.flags, enabled=False),
    "anomaly": functools.partial(torch.autograd.set_detect_anomaly, True),
    "function mode": Functions,
    "operator mode": Operators,
    "generator": call(torch.manual_seed, 1234, 0),
    "numpy errors": functools.partial(np.errstate, all="raise"),
    "warnings": strict_warnings,
    "threads": call(torch.set_num_threads, 2, 1),
}


def state():
    """Everything of torch that a call might leave changed."""
    return (
        [setting.read() for setting in isolation.SETTINGS],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
        torch.get_default_device(),
        [type(mode) for mode in torch.overrides._get_current_function_mode_stack()],
        type(torch.utils._python_dispatch._get_current_dispatch_mode()),
        sys.float_info.min / 2,
        torch.get_num_threads(),
        torch.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),
    )


@pytest.fixture(scope="module")
def train(invented):
    return lambda out: run_experiment("x", SPEC, out, invented, "cpu", compiled=False)


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """The record of a run without any switch, and the path of its weights."""
    out = tmp_path_factory.mktemp("plain")
    record = train(out)
    return record, Run("x", record.spec, out).weights


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_no_switch_changes_a_run_or_is_left_changed(plain, train, switch, tmp_path):
    expected, _ = plain
    with switch():
        before = state()
        record = train(tmp_path)
        assert state() == before
    for what in ("digest", "metrics", "flipped", "answers", "whitening", "data", "exact"):
        assert getattr(record, what) == getattr(expected, what), what


@pytest.fixture(scope="module")
def network(plain, invented):
    """The path of a checkpoint, its logits and its evaluation."""
    _, path = plain
    found = predict.load(path)
    return path, found(invented.test_images), found.evaluate(invented.test_images, invented.test_labels)


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_no_switch_changes_the_logits_of_a_network(network, invented, switch):
    path, logits, evaluated = network
    with switch():
        before = state()
        found = predict.load(path)
        again = found(invented.test_images)
        evaluation = predict.evaluate(path, found, invented)
        top = predict.top_k(found, invented.test_images[0].view(3, 32, 32))
        assert state() == before
    assert again.dtype == torch.float32
    assert torch.equal(again, logits)
    assert evaluation.result == evaluated
    assert evaluation.same
    assert top == predict.top_k(predict.load(path), invented.test_images[0].view(3, 32, 32))


@contextlib.contextmanager
def several():
    """Several switches at once that might change an export or the data that is read."""
    with contextlib.ExitStack() as stack:
        for name in ("float64", "default device", "autocast", "inference mode", "function mode", "generator"):
            stack.enter_context(SWITCHES[name]())
        yield


def test_no_switch_changes_an_export(network, invented, tmp_path):
    path, logits, _ = network
    images = invented.test_images.view(-1, 3, 32, 32)
    with several():
        before = state()
        export(predict.load(path), "torch", tmp_path / "x.pt2", images[:5])
        assert state() == before
    again = torch.export.load(tmp_path / "x.pt2").module()(images)
    assert torch.allclose(again, logits, atol=1e-5)


def test_no_switch_changes_the_data_that_is_read(data_dir, cifar10):
    with several():
        again = dataset.read(Path(data_dir))
    assert all(t.device.type == "cpu" for t in again.tensors.values())
    assert torch.equal(again.test_images, cifar10.test_images)
    assert torch.equal(again.train_labels, cifar10.train_labels)


def test_a_template_that_was_made_under_another_dtype_is_not_kept(network, plain):
    with SWITCHES["float64"]():
        assert model.template(model.folded(plain[0].spec))[0]["1.weight"].dtype == torch.float64
        predict.load(network[0])


def test_settings_come_back_when_the_last_of_several_calls_has_ended():
    with SWITCHES["float64"]():
        first, second = isolated(), isolated()
        with first:
            second.__enter__()
        assert torch.get_default_dtype() == torch.float32  # the second call needs it
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64


def test_settings_come_back_after_an_error():
    with SWITCHES["deterministic"](), SWITCHES["device"](), SWITCHES["flush denormal"]():
        before = state()
        with pytest.raises(KeyError), isolated("tf32"):
            raise KeyError
        assert state() == before


def test_threads_that_flush_subnormals_for_ever_are_refused():
    """Each thread of Python has a pool of its own, whose threads keep the setting of their start."""

    def flushed_before():
        torch.set_num_threads(2)
        torch.set_flush_denormal(True)
        torch.ones(1 << 17) * 2
        torch.set_flush_denormal(False)
        check_threads()

    threads = torch.get_num_threads()
    check_threads()
    try:
        with ThreadPoolExecutor(1) as pool, pytest.raises(SettingError, match="subnormal numbers"):
            pool.submit(flushed_before).result()
    finally:
        torch.set_num_threads(threads)
    check_threads()
