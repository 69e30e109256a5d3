"""The border to the machine: compiled against eager, one compilation for many specs, the cache of libraries, devices.

Libraries come from the ordinary cache, so a second call of pytest compiles only what must be compiled in the test.
"""

import contextlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from core.compile import builder, cache, fused, inductor
from core.compile.device import DeviceError, pick_device, to_device
from core.functional import step, tree
from core.runs import store
from core.spec import static
from tests.conftest import MUON, ROOT

GRAPHS = torch._dynamo.utils.counters["stats"]  # "unique_graphs" counts what Dynamo has compiled in this process
CPU = torch.device("cpu")
NO_COMPILER = "no C++ compiler (g++ or clang++) was found"

compiles = pytest.mark.skipif(fused.compiler_problem(CPU) is not None, reason="no C++ compiler here")
forks = pytest.mark.skipif(not builder.CAN_FORK, reason="processes are forked on Linux only")


def clone(tree):
    return {key: clone(value) if isinstance(value, dict) else value.clone() for key, value in tree.items()}


@pytest.fixture(scope="module")
def compiled(default_inputs):
    """The spec of the default network, the inputs of its step, and the state after one compiled step."""
    spec, state, data, hyper = default_inputs()
    after = clone(state)
    fused.fuse(spec, after, data, hyper).advance()
    return spec, state, data, hyper, after


@pytest.fixture
def nothing_compiles(compiled, monkeypatch):
    def refuse(*_):
        raise AssertionError("a second compilation")

    monkeypatch.setattr(builder, "_fork", refuse)
    monkeypatch.setattr(cache, "_build_and_keep", refuse)


def assert_close(one, other):
    """Statistics, gradients and parameters after one step.

    Adam divides a gradient by its own size. Where the gradient is mere rounding error (all of a bias before batch
    norm), the update is a whole step of either sign; such elements are left out of the parameters, not of the
    gradients.
    """
    gradients = {name: mean / 0.1 for name, mean in other["opt"]["exp_avg"].items()}
    compared = 0
    for name, value in one["params"].items():
        torch.testing.assert_close(one["opt"]["exp_avg"][name], gradients[name] * 0.1, rtol=1e-5, atol=1e-6)
        sure = gradients[name].abs() > 1e-5
        compared += int(sure.sum())
        torch.testing.assert_close(value[sure], other["params"][name][sure], rtol=1e-5, atol=1e-5)
    assert compared > 0.9 * sum(value.numel() for value in one["params"].values())
    for name, value in one["stats"].items():
        torch.testing.assert_close(value, other["stats"][name], rtol=1e-5, atol=1e-5)
    assert one["metrics"]["loss"].item() == pytest.approx(other["metrics"]["loss"].item(), rel=1e-5)
    assert one["metrics"]["correct"].item() == other["metrics"]["correct"].item()


# Compiled against eager


@compiles
@pytest.mark.slow
def test_compiled_step_is_near_the_eager_one(compiled):
    """The dropout mask must be the same bits: another would be far outside the tolerance."""
    spec, state, data, hyper, after = compiled
    eager = step.make_train_step(static(spec))(state, data, hyper)
    assert_close(after, eager)
    assert int(after["step"]) == 1
    for name, second in eager["opt"]["exp_avg_sq"].items():
        torch.testing.assert_close(after["opt"]["exp_avg_sq"][name], second, rtol=1e-3, atol=1e-8)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 5e-4},
        {"lr": 1e-4},
        {"seed": 12345},
        {"dropout": 0.5},
        {"weight_decay": 0.1},
        {"label_smoothing": 0.1},
        {"epochs": 3, "warmup_epochs": 0.5},
    ],
    ids=str,
)
def test_another_spec_of_the_same_shape_compiles_nothing(nothing_compiles, default_inputs, changes):
    """Two steps each, with new buffers, as the next experiment of a suite has; and they are its own steps."""
    spec, state, data, hyper = default_inputs(**changes)
    eager = step.make_train_step(static(spec))(state, data, hyper)
    advance = fused.fuse(spec, state, data, hyper).advance
    advance()
    first = clone(state)
    advance()
    assert int(state["step"]) == 2
    assert_close(first, eager)


@compiles
@pytest.mark.slow
def test_a_new_order_of_the_same_epoch_length_compiles_nothing(compiled, nothing_compiles):
    """Each epoch copies its order into the same buffer."""
    spec, state, data, hyper, _ = compiled
    state, data = clone(state), {**data, "order": data["order"].clone()}
    advance = fused.fuse(spec, state, data, hyper).advance
    for _ in range(9):
        advance()
    data["order"].copy_(data["order"].flip(0))
    advance()
    assert int(state["step"]) == 10


@compiles
@pytest.mark.slow
def test_compiled_steps_repeat_bit_for_bit(compiled):
    spec, state, data, hyper, after = compiled
    again = clone(state)
    fused.fuse(spec, again, data, hyper).advance()
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(after), tree.leaves(again), strict=True))


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"shift_fill": "reflect", "shift": 5, "cutout": 8, "mixup": 0.5},
        {"rotate": 15, "zoom": 0.2, "optimizer": "nesterov", "clip": 0.5, "schedule": "one-cycle"},
    ],
    ids=str,
)
def test_another_shape_compiles_and_in_this_process_too(small_spec, step_inputs, monkeypatch, changes):
    """Where no process can be forked, this one compiles: one graph, counted by Dynamo."""
    monkeypatch.setattr(builder, "CAN_FORK", False)
    spec = small_spec(**{"optimizer": "sgd", "augment": "flip+shift", "widths": [32], "dropout": 0.0} | changes)
    state, data, hyper = step_inputs(spec)
    eager = step.make_train_step(static(spec))(state, data, hyper)
    is_there = cache.find(fused._recipe(spec, (state, data, hyper))) is not None  # from an earlier call of pytest
    graphs, environment = GRAPHS["unique_graphs"], dict(os.environ)
    fused.compile_ahead(spec, state, data, hyper)
    assert GRAPHS["unique_graphs"] == graphs
    fused.fuse(spec, state, data, hyper).advance()
    assert GRAPHS["unique_graphs"] == graphs + (not is_there)
    assert os.environ == environment
    for name, value in state["params"].items():
        torch.testing.assert_close(value, eager["params"][name], rtol=1e-5, atol=1e-5)


@compiles
@pytest.mark.slow
def test_residual_blocks_compiled(small_spec, step_inputs):
    """Near the eager step, and the same bits on one thread and on two: layer norm reduces along the other axis than
    batch norm. The batch is no multiple of what a vector holds."""
    spec = small_spec(norm="layer", activation="gelu", expansion=4, widths=[32], batch_size=50)
    start, data, hyper = step_inputs(spec)
    threads, after = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            state = clone(start)
            made = fused.fuse(spec, state, data, hyper)
            assert made.mode == "compiled"
            made.advance()
            first = clone(state)
            for _ in range(9):
                made.advance()
            after.append(state)
    finally:
        torch.set_num_threads(threads)
    assert_close(first, step.make_train_step(static(spec))(start, data, hyper))
    assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, after), strict=True))


@compiles
@pytest.mark.slow
def test_a_compiled_step_of_muon_in_bfloat16_is_near_the_eager_one(default_inputs):
    """In the middle of a cycle, where the rate is high. What is rounded to bfloat16 differs here and there, so tensors
    are compared as a whole; the iterations inside Muon enlarge the differences (see test_optim.py)."""
    spec, state, data, hyper = default_inputs(**MUON, epochs=1, weight_decay=0.1)
    state["step"].fill_(13)
    before, eager = clone(state), step.make_train_step(static(spec))(state, data, hyper)
    made = fused.fuse(spec, state, data, hyper)
    assert made.mode == "compiled"
    made.advance()
    for name in state["opt"]["momentum"]:
        old, new, other = (each["params"][name] for each in (before, state, eager))
        assert (new - other).norm() < 0.1 * (new - old).norm()
        assert (new - old).norm() > 0.05 * hyper["lr"] * old.numel() ** 0.5
    assert list(state["opt"]["momentum"]) == ["5.weight", "9.weight"]
    for group, tensors in state["opt"].items():
        for name, t in tensors.items():
            if t.ndim == 2:  # the gradient of a bias before batch norm is mere rounding
                assert (t - eager["opt"][group][name]).norm() < 0.02 * t.norm(), (group, name)
    assert all(torch.equal(copy, state["params"][name].bfloat16()) for name, copy in state["effective"].items())
    assert state["metrics"]["loss"].item() == pytest.approx(eager["metrics"]["loss"].item(), rel=1e-3)


def test_eager_fuse_advances_the_standing_buffers(small_spec, step_inputs):
    """The state is replaced in place, by exactly what the pure step gives."""
    spec = small_spec()
    state, data, hyper = step_inputs(spec)
    pure = step.make_train_step(static(spec))(state, data, hyper)
    addresses = [t.data_ptr() for t in tree.leaves(state)]
    advance = fused.fuse(spec, state, data, hyper, compiled=False).advance
    assert int(state["step"]) == 0
    advance()
    assert [t.data_ptr() for t in tree.leaves(state)] == addresses
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state), tree.leaves(pure), strict=True))
    advance()
    assert int(state["step"]) == 2


# Without a compiler


def test_a_missing_compiler_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert fused.compiler_problem(CPU) == NO_COMPILER
    compiler = tmp_path / "clang++"
    compiler.touch(0o755)
    assert fused.compiler_problem(CPU) is None
    compiler.rename(tmp_path / "mine")
    monkeypatch.setenv("CXX", "mine")
    assert fused.compiler_problem(CPU) is None


@compiles
@pytest.mark.slow
def test_a_library_that_is_there_needs_no_compiler(compiled, nothing_compiles, monkeypatch, tmp_path):
    spec, state, data, hyper, after = compiled
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    again = clone(state)
    fused.fuse(spec, again, data, hyper).advance()
    assert torch.equal(again["metrics"]["loss"], after["metrics"]["loss"]), "the warm library was not used"


def test_without_a_compiler_and_a_library_nothing_is_started(places, monkeypatch, tmp_path, small_spec, step_inputs):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    spec = small_spec()
    inputs = step_inputs(spec)
    fused.compile_ahead(spec, *inputs)
    assert not builder._builders
    with pytest.raises(fused.CompileError, match=r"^no C\+\+ compiler \(g\+\+ or clang\+\+\) was found$"):
        fused.fuse(spec, *inputs)
    assert not places.project.exists()


def test_nothing_is_compiled_for_mps(small_spec):
    state = {"step": SimpleNamespace(device=torch.device("mps"))}
    with pytest.raises(fused.CompileError, match=r"^the step is not compiled for MPS$"):
        fused.fuse(small_spec(), state, {}, {})
    fused.compile_ahead(small_spec(), state, {}, {})


# The patches of torch


PATCHED = {
    "torch._inductor.cpp_builder.CppBuilder.build": "self",
    "torch._inductor.codecache._precompile_header": "header, hashable_cmd_line, **compile_command",
    "torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu.generate_input_output_runtime_checks": "self",
    "torch._inductor.codegen.cpp.LoopNest.max_parallel_depth": "self",
}


@compiles
def test_what_is_patched_is_there_with_its_signature(tmp_path):
    """At most five names, each with the parameters that its replacement was written for."""
    replaced = []

    def watch(owner, name, new):
        place = f"{owner.__module__}.{owner.__name__}" if inspect.isclass(owner) else owner.__name__
        replaced.append(f"{place}.{name}")
        return patch_object(owner, name, new)

    patch_object = mock.patch.object
    with mock.patch.object(inductor.mock.patch, "object", watch), inductor.patched(tmp_path):
        pass
    assert sorted(replaced) == sorted(PATCHED)
    assert len(replaced) <= 5
    for name, parameters in PATCHED.items():
        found = [str(each).split(":")[0] for each in inspect.signature(pkgutil.resolve_name(name)).parameters.values()]
        assert ", ".join(found) == parameters, f"{name} of this version of torch has other parameters"


@compiles
@forks
@pytest.mark.slow
def test_where_a_patch_fails_the_step_is_compiled_without(places, monkeypatch, small_spec, step_inputs):
    def gone():
        raise AttributeError("no such name in this torch")

    monkeypatch.setattr(inductor, "no_input_checks", gone)
    spec = small_spec(widths=[8], norm="none", dropout=0.0)
    state, data, hyper = step_inputs(spec)
    eager = step.make_train_step(static(spec))(state, data, hyper)
    made = fused.fuse(spec, state, data, hyper)
    assert (made.mode, made.problem) == ("unpatched", "no such name in this torch")
    made.advance()
    assert_close(state, eager)
    again = fused.fuse(spec, *step_inputs(spec))
    assert (again.mode, again.problem) == (made.mode, made.problem), "a library from the cache hides how it was made"


# The cache, with libraries that are only bytes


class Places:
    """A cache of its own: `project`/.cache is preferred, then `home`/cifar10-mlp. Counts what is built in it."""

    def __init__(self, folder):
        self.project, self.home, self.log = folder / "project", folder / "home", folder / "built"
        self.cache = self.project / ".cache"

    def recipe(self, build=lambda: None, name="0" * 32, inputs=(2, 0)):
        """A library, of two of three tensors; `build` is called when it is built."""

        def build_and_count(scratch):
            with open(self.log, "a") as log:
                log.write(f"{os.getpid()}\n")
            build()
            return cache.Built(b"library", list(inputs), "")

        return cache.Recipe(name, 3, build_and_count)

    def built(self):
        """The processes that have built something."""
        return self.log.read_text().split() if self.log.exists() else []

    def libraries(self):
        return sorted(self.project.parent.rglob("*.so"))


@pytest.fixture
def places(tmp_path, monkeypatch):
    found = Places(tmp_path)
    monkeypatch.setattr(cache, "PROJECT", found.project)
    monkeypatch.setattr(cache, "_chosen", None)
    monkeypatch.setattr(builder, "_builders", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(found.home))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    return found


@forks
def test_a_library_is_built_once_by_another_process(places):
    recipe = places.recipe()
    assert cache.find(recipe) is None
    library = cache.get_or_build(recipe)
    assert (
        library == cache.get_or_build(recipe) == cache.find(recipe) == (places.cache / f"{recipe.name}.so", [2, 0], "")
    )
    assert library.path.read_bytes() == b"library"
    assert cache.problem() is None
    assert len(places.built()) == 1
    assert places.built() != [str(os.getpid())]
    assert {path.suffix for path in places.cache.iterdir()} == {".so", ".json", ".lock"}


def test_where_no_process_can_be_forked_this_one_builds(places, monkeypatch):
    monkeypatch.setattr(builder, "CAN_FORK", False)
    environment = dict(os.environ)
    cache.build_ahead(places.recipe())
    assert not places.built()
    with pytest.raises(builder.BuildError, match=r"^the linker is "):
        cache.get_or_build(places.recipe(fail))
    assert cache.get_or_build(places.recipe()).inputs == [2, 0]
    assert places.built() == 2 * [str(os.getpid())]
    assert os.environ == environment
    assert {path.suffix for path in places.cache.iterdir()} == {".so", ".json", ".lock"}


@forks
def test_two_processes_do_not_build_the_same_library(places):
    recipe = places.recipe(lambda: time.sleep(0.5))
    path = cache.folder() / f"{recipe.name}.so"
    for name in ("one", "other"):
        builder.start(name, lambda: cache._build_and_keep(recipe, path))
    for name in ("one", "other"):
        builder.wait(name)
    assert len(places.built()) == 1


def test_only_what_is_built_goes_to_the_folder_that_is_chosen(places, monkeypatch, tmp_path):
    """A library that is in the user's cache folder is used where it lies, and nothing is created anywhere."""
    monkeypatch.setenv(cache.VARIABLE, str(places.home / "cifar10-mlp"))
    cache.get_or_build(places.recipe())
    monkeypatch.setattr(cache, "_chosen", None)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "chosen"))
    assert cache.get_or_build(places.recipe()).path.parent == places.home / "cifar10-mlp"
    assert len(places.built()) == 1
    assert not (tmp_path / "chosen").exists()
    assert cache.get_or_build(places.recipe(name="1" * 32)).path.parent == tmp_path / "chosen"
    assert len(places.built()) == 2
    assert cache.problem() is None


def test_the_default_that_torch_exports_is_not_the_choice_of_the_user(places, monkeypatch):
    """Importing Dynamo exports it, and it lies in a temporary folder."""
    monkeypatch.setenv(cache.VARIABLE, os.path.join(tempfile.gettempdir(), "torchinductor_me"))
    assert cache.folder() == places.cache


PROGRAM = """
import os, sys
before = dict(os.environ)
import torch
from core.compile import builder, cache, fused, inductor
from core.functional import step
from core.spec import resolve
assert dict(os.environ) == before, "an import has changed the environment"
assert cache.problem() is None
spec = resolve({"widths": [8], "batch_size": 4})
images, labels = torch.zeros(8, 3072, dtype=torch.uint8), torch.arange(8)
data = {"images": images, "labels": labels, "order": torch.arange(8).view(2, 4)}
hyper = step.hyper_tensors(spec, 2, torch.device("cpu"))
fused.fuse(spec, step.init_state(spec), data, hyper, compiled=False).advance()
library = cache.get_or_build(cache.Recipe("0" * 32, 3, lambda scratch: cache.Built(b"library", [0], "")))
assert library.path.read_bytes() == b"library"
print(library.path.parent)
print(cache.problem())
"""


@pytest.mark.slow
def test_a_project_that_cannot_be_written_trains(tmp_path):
    """It uses the user's cache folder, or else a temporary one until it ends, and says so in one line."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "core", project / "core", ignore=shutil.ignore_patterns("__pycache__"))
    (project / ".cache").touch()  # A folder of this name cannot be created, not even by root.
    (tmp_path / "temporary").mkdir()
    unwritable = tmp_path / "unwritable"
    unwritable.touch()
    environment = {key: value for key, value in os.environ.items() if key != cache.VARIABLE}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path / "temporary")}
    settings = [
        {"XDG_CACHE_HOME": str(tmp_path / "home"), cache.VARIABLE: str(unwritable)},
        {"XDG_CACHE_HOME": str(unwritable)},
    ]
    programs = [
        subprocess.Popen(
            (sys.executable, "-c", PROGRAM),
            cwd=project,
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for more in settings
    ]
    (first, errors), (second, more_errors) = (program.communicate() for program in programs)
    assert [program.returncode for program in programs] == [0, 0], errors + more_errors
    folder, problem = first.splitlines()
    assert folder == str(tmp_path / "home" / "cifar10-mlp")
    assert problem == f"cannot write {unwritable} (Not a directory): compiled steps are kept in {folder}"
    folder, problem = second.splitlines()
    assert Path(folder).parent == tmp_path / "temporary"
    assert not Path(folder).exists(), "the temporary folder is left"
    reason = f"cannot write {project / '.cache'} (Not a directory)"
    assert problem == f"{reason}: compiled steps are kept in {folder} until this process ends"


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="no folder here that refuses everybody")
def test_a_folder_without_permission_is_passed_over(places, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "/sys/x")
    assert cache.folder() == places.home / "cifar10-mlp"
    assert re.fullmatch(r"cannot write /sys/x \(.*permi.*\): compiled steps are kept in (.*)", cache.problem(), re.I)
    assert cache.problem().endswith(f" {places.home / 'cifar10-mlp'}")


def test_a_folder_whose_files_others_can_change_is_passed_over(places, monkeypatch):
    """Such as a file system where all files belong to one user, or may be written by everybody."""
    is_trusted = cache._is_trusted
    monkeypatch.setattr(
        cache,
        "_is_trusted",
        lambda file: not os.readlink(f"/proc/self/fd/{file}").startswith(str(places.project)) and is_trusted(file),
    )
    assert cache.get_or_build(places.recipe()).path.parent == places.home / "cifar10-mlp"
    assert cache.problem().startswith(f"cannot write {places.cache} (other users can change the files there): ")


def described(inputs, name="0" * 32):
    """A description of the library b"library", with the right hash."""
    digest = cache._hash(name, cache.Built(b"library", inputs, ""))
    return json.dumps({"inputs": inputs, "problem": "", "sha256": digest}).encode()


def swapped(text):
    description = json.loads(text)
    description["inputs"].reverse()
    return json.dumps(description).encode()


DAMAGE = {
    "half a library": (".so", lambda data: data[: len(data) // 2]),
    "an empty library": (".so", lambda data: b""),
    "another bit in the library": (".so", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "no library": (".so", None),
    "a folder for a library": (".so", Path.mkdir),
    "a pipe for a library": (".so", os.mkfifo),
    "an empty description": (".json", lambda text: b""),
    "a list for a description": (".json", lambda text: b"[0, 1]"),
    "half a description": (".json", lambda text: text[: len(text) // 2]),
    "inputs in another order": (".json", swapped),
    "no description": (".json", None),
    "a description nested deeply": (".json", lambda text: b'{"x":' + b"[" * 20_000),
    "a description nested very deeply": (".json", lambda text: b"[" * 100_000),
    "an endless description": (".json", lambda text: text + b" " * 10_000_000),
    "binary rubbish": (".json", lambda text: bytes(range(256))),
    "an input that the caller lacks": (".json", lambda text: described([0, 3])),
    "a negative input": (".json", lambda text: described([0, -1])),
    "an input twice": (".json", lambda text: described([1, 1])),
    "the library of another step": (".json", lambda text: described([2, 0], "1" * 32)),
    "inputs that are no integers": (".json", lambda text: described([0.5, True])),
    "an input beyond 64 bits": (".json", lambda text: described([0, 10**30])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_library_is_built_anew(places, damage):
    """It is never loaded: that could end the process, or train wrongly."""
    suffix, damage = DAMAGE[damage]
    recipe = places.recipe()
    library = cache.get_or_build(recipe)
    path = library.path.with_suffix(suffix)
    good = path.read_bytes()
    path.unlink()
    if damage in (Path.mkdir, os.mkfifo):
        damage(path)
    elif damage:
        path.write_bytes(damage(good))
    assert cache.find(recipe) is None
    if damage is Path.mkdir:
        path.rmdir()
    assert cache.get_or_build(recipe) == library
    assert path.read_bytes() == good
    assert len(places.built()) == 2


@pytest.mark.parametrize("suffix", [".so", ".json"])
@pytest.mark.parametrize(
    "take_over",
    [
        pytest.param(
            lambda path: os.chown(path, 12345, 12345),
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away"),
            id="owned by another user",
        ),
        pytest.param(lambda path: path.chmod(0o646), id="writable by everybody"),
        pytest.param(lambda path: path.chmod(0o664), id="writable by a group"),
    ],
)
def test_a_library_that_another_user_can_write_is_built_anew(places, suffix, take_over):
    recipe = places.recipe()
    path = cache.get_or_build(recipe).path.with_suffix(suffix)
    take_over(path)
    assert cache.find(recipe) is None, "a library that another user can write is loaded"
    assert cache.get_or_build(recipe).path == path.with_suffix(".so")
    assert path.stat().st_uid == os.geteuid()
    assert len(places.built()) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_library_of_the_owner_of_this_code_is_used(places, monkeypatch, tmp_path):
    """A shared install: its owner could change the code as well."""
    recipe = places.recipe()
    library = cache.get_or_build(recipe)
    code = tmp_path / "cache.py"
    code.touch()
    for path in (code, library.path, library.path.with_suffix(".json")):
        os.chown(path, 12345, 12345)
    assert cache.find(recipe) is None
    monkeypatch.setattr(cache, "__file__", str(code))
    assert cache.find(recipe) == library


def test_a_library_is_trusted_whatever_the_umask(places):
    before = os.umask(0)
    try:
        library = cache.get_or_build(places.recipe())
    finally:
        os.umask(before)
    assert cache.find(places.recipe()) == library
    assert not any(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for path in places.cache.glob("*.so"))


# Building that fails


def fail():
    raise RuntimeError("the linker is \x1b[31mmissing\nand much more")


@forks
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (fail, "the linker is [31mmissing"),
        (lambda: sys.exit("x" * 1000), "x" * 200),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the compiling process was ended by signal 9"),
        (lambda: os._exit(7), f"the library that was built in {'{cache}'} cannot be read"),
    ],
    ids=["raises", "exits", "killed", "gone"],
)
def test_a_failure_is_told_in_one_line_and_not_repeated(places, capfd, build, reason):
    with pytest.raises(builder.BuildError) as raised:
        cache.get_or_build(places.recipe(build))
    assert str(raised.value) == reason.format(cache=places.cache)
    assert len(places.built()) == 1, "what had failed was built again"
    assert capfd.readouterr() == ("", ""), "the compiling process has written to the terminal"
    assert not places.libraries()
    cache.get_or_build(places.recipe())


@forks
def test_a_failure_ahead_is_told_when_the_library_is_needed(places):
    cache.build_ahead(places.recipe(fail))
    cache.build_ahead(places.recipe(fail))
    with pytest.raises(builder.BuildError, match=r"^the linker is "):
        cache.get_or_build(places.recipe(fail))
    assert len(places.built()) == 1


@forks
def test_the_builder_runs_no_handler_of_ours(places, tmp_path):
    """One of the command line would save, print and delete."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    before = {number: signal.signal(number, lambda *_: (tmp_path / "handled").touch()) for number in numbers}
    try:
        for number in numbers:
            with pytest.raises(builder.BuildError, match=f"^the compiling process was ended by signal {number:d}$"):
                cache.get_or_build(places.recipe(lambda number=number: os.kill(os.getpid(), number)))
        assert not (tmp_path / "handled").exists()
        signal.raise_signal(signal.SIGUSR1)
        assert (tmp_path / "handled").exists(), "the signals of this process are still blocked"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@forks
def test_the_builder_has_no_open_file_of_ours(places, tmp_path):
    """It could not write to one, nor keep one locked; nor do its own files get mixed up with ours."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(tmp_path / f"log {i}", "w")) for i in range(20)]

        def build():
            reader, writer = os.pipe()
            for file in files:
                print("from the builder", file=file, flush=True)
            os.close(writer)
            assert os.read(reader, 1) == b"", "a file of the parent's has become a pipe of the builder's"

        cache.get_or_build(places.recipe(build))
    assert not any(path.read_text() for path in tmp_path.glob("log *"))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a shell script the C++ compiler."""

    def make(script):
        path = tmp_path / "c++"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return make


@forks
@pytest.mark.slow
def test_a_failing_compiler_is_quiet(places, compiler, capfd, small_spec, step_inputs):
    says = "fatal error: no such thing"
    compiler(f"case $* in *--version*) echo g++ 13;; *) echo In file x: >&2; echo x.h:1: {says} >&2; exit 1;; esac")
    spec = small_spec(widths=[8], norm="none", dropout=0.0)  # quick to compile, as it is tried twice
    with pytest.raises(fused.CompileError) as raised:
        fused.fuse(spec, *step_inputs(spec))
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert capfd.readouterr() == ("", ""), "the C++ compiler has written to the terminal"


AFTER_A_GRADIENT = """
import torch
from core.compile import fused
from core.functional import step
from core.spec import resolve

torch._C._ensureCUDADeviceGuardSet()  # as if there were a GPU, for which autograd starts a thread
torch.zeros((), requires_grad=True).backward()
spec = resolve({"widths": [8], "batch_size": 4, "norm": "none", "dropout": 0.0})
images, labels = torch.zeros(8, 3072, dtype=torch.uint8), torch.arange(8)
data = {"images": images, "labels": labels, "order": torch.arange(8).view(2, 4)}
inputs = spec, step.init_state(spec), data, step.hyper_tensors(spec, 2, torch.device("cpu"))
fused.compile_ahead(*inputs)
print(fused.fuse(*inputs).mode)
"""


@forks
@pytest.mark.slow
def test_a_step_compiles_after_autograd_has_started_its_threads(tmp_path):
    """A fork of such a process cannot differentiate, so it compiles by itself."""
    command, env = (sys.executable, "-c", AFTER_A_GRADIENT), os.environ | {cache.VARIABLE: str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["compiled"], done.stderr


HANGING = """
import os, signal, sys, time
from pathlib import Path
import torch
from core.compile import builder, cache, fused, inductor
from core.functional import step
from core.spec import resolve

def stop(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)
spec = resolve({"widths": [8], "batch_size": 4})
images, labels = torch.zeros(8, 3072, dtype=torch.uint8), torch.arange(8)
data = {"images": images, "labels": labels, "order": torch.arange(8).view(2, 4)}
inputs = spec, step.init_state(spec), data, step.hyper_tensors(spec, 2, torch.device("cpu"))
fused.compile_ahead(*inputs)
if sys.argv[1] == "exit":
    while not Path(sys.argv[2]).exists():
        time.sleep(0.05)
    if not os.fork():
        time.sleep(600)
    sys.exit()
try:
    fused.fuse(*inputs)
except KeyboardInterrupt:
    sys.exit("stopped")
"""


def until(condition, promise):
    """Wait for it; the bound is for a machine that is busy with other things."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, promise
        time.sleep(0.05)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@forks
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, "exit"], ids=["SIGTERM", "SIGKILL", "exit"])
def test_a_hanging_compiler_ends_with_the_process(compiler, tmp_path, how):
    """However the process ends; a fork of it that lives on changes nothing."""
    compiler(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/started; exec sleep 100000")
    started, folder = tmp_path / "started", tmp_path / "cache"
    process = subprocess.Popen(
        (sys.executable, "-c", HANGING, str(how), str(started)),
        cwd=ROOT,
        env=os.environ | {cache.VARIABLE: str(folder)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until(lambda: started.exists() or process.poll() is not None, "the C++ compiler was not started")
        hanging = int(started.read_text())
        assert is_running(hanging)
        if how != "exit":
            process.send_signal(how)
        status = process.wait(timeout=120)
        until(lambda: not is_running(hanging), "a hanging C++ compiler outlives the process that needed it")
        with store.locked(next(folder.glob("*.lock")), timeout=120):  # The builder has ended too.
            pass
    finally:
        left = [(os.killpg, process.pid), *((os.kill, int(file.read_text())) for file in (started,) if file.exists())]
        for kill, number in left:
            with contextlib.suppress(ProcessLookupError):
                kill(number, signal.SIGKILL)
    assert status == {signal.SIGTERM: 1, signal.SIGKILL: -9, "exit": 0}[how]
    assert process.stderr.read() == ("stopped\n" if how == signal.SIGTERM else "")


# Devices


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(DeviceError, match=f"^device {name} is not there; present: cpu$"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_to_device_copies_the_tree():
    tree = {"a": {"b": torch.arange(3)}, "c": torch.tensor(1.0, dtype=torch.float64)}
    moved = to_device(tree, CPU)
    assert torch.equal(moved["a"]["b"], tree["a"]["b"])
    assert moved["c"].dtype == torch.float64
