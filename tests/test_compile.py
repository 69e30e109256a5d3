"""The border to the machine: compiled against eager, one compilation for many specs, the cache of libraries, devices.

Libraries come from the ordinary cache, so a second call of pytest compiles only what must be compiled in the test.
"""

import errno
import getpass
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
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from core import store
from core.compile import cache, fused, inductor, worker
from core.compile.device import DeviceError, pick_device, to_device
from core.functional import step, tree
from core.mode import Mode
from core.spec import static
from tests.conftest import MUON, ROOT

if not hasattr(os, "geteuid"):
    pytest.skip("the step is compiled on Unix alone", allow_module_level=True)

GRAPHS = torch._dynamo.utils.counters["stats"]  # "unique_graphs" counts what Dynamo has compiled in this process
CPU, CPU_TENSOR = torch.device("cpu"), torch.zeros(2)
NO_COMPILER = "no C++ compiler (g++ or clang++) was found"

compiles = pytest.mark.skipif(fused.compiler_problem(CPU) is not None, reason="no C++ compiler here")


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

    monkeypatch.setattr(cache, "_build", refuse)


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
    "shape",
    [{"widths": [32], "expansion": 4, "norm": "layer"}, {"widths": [32, 16], "locality": [3.0, 6.0], "ema": 0.9}],
    ids=["residual", "local"],
)
def test_another_shape_compiles(small_spec, step_inputs, shape):
    """Residual blocks or local layers, and all that augmentation has: one graph, counted by Dynamo, near the eager
    step. The batch is no multiple of what a vector holds."""
    spec = small_spec(
        **shape,
        activation="gelu",
        batch_size=50,
        augment="flip+shift",
        shift=5,
        shift_fill="reflect",
        cutout=8,
        mixup=0.5,
        optimizer="nesterov",
        clip=0.5,
        schedule="one-cycle",
    )
    state, data, hyper = step_inputs(spec)
    eager = step.make_train_step(static(spec))(state, data, hyper)
    is_cached = cache.find(fused._recipe(spec, (state, data, hyper))) is not None  # from an earlier call of pytest
    graphs, environment = GRAPHS["unique_graphs"], dict(os.environ)
    made = fused.fuse(spec, state, data, hyper)
    assert made.mode == Mode("compiled")
    made.advance()
    assert GRAPHS["unique_graphs"] == graphs + (not is_cached)
    assert os.environ == environment
    for name, gradient in state["opt"]["momentum"].items():
        torch.testing.assert_close(gradient, eager["opt"]["momentum"][name], rtol=1e-5, atol=1e-6)
    for name, value in state["params"].items():
        torch.testing.assert_close(value, eager["params"][name], rtol=1e-5, atol=1e-5)


def test_dynamo_follows_any_number_of_shapes():
    """It has a limit for each code object, which a sweep over shapes would reach."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    for n in range(1, 2 + 2 * torch._dynamo.config.recompile_limit):
        donated = fused.in_place(lambda state, data, hyper: {"x": state["x"] + 1})
        state = {"x": torch.zeros(n + 1)}
        torch.compile(donated, fullgraph=True, dynamic=False, backend=keep)(state, {}, {})
        assert len(graphs) == n
        assert (state["x"] == 1).all()


@compiles
@pytest.mark.slow
def test_a_compiled_step_of_muon_in_bfloat16_is_near_the_eager_one(default_inputs):
    """In the middle of a cycle, where the rate is high. What is rounded to bfloat16 differs here and there, so tensors
    are compared as a whole; the iterations inside Muon enlarge the differences (see test_optim.py)."""
    spec, state, data, hyper = default_inputs(**MUON, epochs=2, weight_decay=0.1)
    state["step"].fill_(3)
    before, eager = clone(state), step.make_train_step(static(spec))(state, data, hyper)
    made = fused.fuse(spec, state, data, hyper)
    assert made.mode == Mode("compiled")
    made.advance()
    for name in state["opt"]["momentum"]:
        old, new, other = (each["params"][name] for each in (before, state, eager))
        assert (new - other).norm() < 0.1 * (new - old).norm()
        assert (new - old).norm() > 0.05 * hyper["lr"] * old.numel() ** 0.5
    assert list(state["opt"]["momentum"]) == ["5.weight"]
    for group, tensors in state["opt"].items():
        for name, t in tensors.items():
            if t.ndim == 2:  # the gradient of a bias before batch norm is mere rounding
                assert (t - eager["opt"][group][name]).norm() < 0.02 * t.norm(), (group, name)
    assert all(torch.equal(copy, state["params"][name].bfloat16()) for name, copy in state["effective"].items())
    assert state["metrics"]["loss"].item() == pytest.approx(eager["metrics"]["loss"].item(), rel=1e-3)


def test_an_eager_step_updates_the_buffers_in_place(small_spec, step_inputs):
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


def test_a_missing_compiler_is_reported_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert fused.compiler_problem(CPU) == NO_COMPILER
    for program, remedy in (("apt", "apt install g++"), ("xcode-select", "xcode-select --install")):
        (tmp_path / program).touch(0o755)
        assert fused.compiler_problem(CPU) == f"{NO_COMPILER} (try: {remedy})"
    compiler = tmp_path / "clang++"
    compiler.touch(0o755)
    assert fused.compiler_problem(CPU) is None
    compiler.rename(tmp_path / "mine")
    monkeypatch.setenv("CXX", "mine")
    assert fused.compiler_problem(CPU) is None


def test_nothing_is_compiled_on_windows_in_one_line(monkeypatch):
    """Even where a g++ lies on the PATH: torch takes no notice of it there."""
    monkeypatch.setattr(sys, "platform", "win32")
    assert fused.compiler_problem(CPU) == "the step is not compiled on Windows"


OLD = "g++: error: unrecognized command line option '-std=c++20'; did you mean '-std=c++2a'?"
NO_OPENMP = "/a/long/path/" + "torch/" * 40 + "ParallelOpenMP.h:14:10: fatal error: 'omp.h' file not found"


@pytest.mark.parametrize(
    ("says", "problem", "debian", "macos"),
    [
        (f"Output:\n{NO_OPENMP}\n", "clang++ finds no omp.h", "apt install libomp-dev", "brew install libomp"),
        (OLD, "torch needs g++ 10 or newer", "apt install g++-10; export CXX=g++-10", "xcode-select --install"),
        ("", "no C++ compiler works", "apt install g++", "xcode-select --install"),
    ],
    ids=["clang++ without OpenMP", "an old g++", "a compiler that does not start"],
)
def test_what_a_compiler_lacks_is_said_with_its_remedy(monkeypatch, tmp_path, says, problem, debian, macos):
    from torch._inductor import exc

    monkeypatch.setenv("PATH", str(tmp_path))
    error = exc.CppCompileError(["g++", "-std=c++20"], says) if says else exc.InvalidCxxCompiler()
    assert cache.first_line(error) == problem
    for program, remedy in (("apt", debian), ("xcode-select", macos)):
        (tmp_path / program).touch(0o755)
        assert cache.first_line(error) == f"{problem} (try: {remedy})"
    other = exc.CppCompileError(["g++", "-std=c++20"], "x.cpp:1: error: no such thing")
    assert cache.first_line(other).endswith(": x.cpp:1: error: no such thing")


def test_the_compiler_is_what_a_shell_would_take(monkeypatch, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("g++", "ccache"):
        (folder / name).touch(0o755)
    monkeypatch.setenv("PATH", str(folder))
    expected = {
        "": ["g++"],
        "ccache g++": ["ccache", "g++"],
        "g++ -O1 -g": ["g++", "-O1", "-g"],
        f"{folder}/ccache": [f"{folder}/ccache"],
        f"'{folder}/ccache' g++ -O1": [f"{folder}/ccache", "g++", "-O1"],
        "nothing": ["g++"],
        "ccache nothing": ["g++"],
        "g++ 'unfinished": ["g++"],
        "-O1": ["g++"],
    }
    for variable, words in expected.items():
        monkeypatch.setenv("CXX", variable)
        assert fused._compiler() == words


@compiles
@pytest.mark.slow
def test_a_cached_library_needs_no_compiler(compiled, nothing_compiles, monkeypatch, tmp_path):
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
    with pytest.raises(fused.CompileError, match=r"^no C\+\+ compiler \(g\+\+ or clang\+\+\) was found$"):
        fused.fuse(spec, *inputs)
    assert not places.project.exists()


def test_nothing_is_compiled_for_mps(small_spec):
    state = {"step": SimpleNamespace(device=torch.device("mps"))}
    with pytest.raises(fused.CompileError, match=r"^the step is not compiled for MPS$"):
        fused.fuse(small_spec(), state, {}, {})


# The patches of torch


PATCHED = {
    "torch._inductor.cpp_builder.CppBuilder.build": "self",
    "torch._inductor.codecache._precompile_header": "header, hashable_cmd_line, **compile_command",
    "torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu.generate_input_output_runtime_checks": "self",
    "torch._inductor.codegen.cpp.LoopNest.max_parallel_depth": "self",
}


@compiles
def test_the_patched_names_exist_with_their_signatures(tmp_path, monkeypatch):
    """At most five names, each with the parameters that its replacement was written for."""
    replaced, nothing = [], Future()
    nothing.set_result(None)
    monkeypatch.setattr(inductor.worker, "start", lambda work: nothing)  # no header is compiled

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


def test_the_settings_of_torch_are_pinned(monkeypatch):
    """Neither a variable nor the caller changes what is compiled, or whether anything is."""
    from torch._inductor import config

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG", "fast")
    assert inductor._defaults(config)["cpp.enable_floating_point_contract_flag"] == "off"
    graphs = []
    unsafe = {"cpp.enable_unsafe_math_opt_flag": True, "cpp.simdlen": 1, "split_reductions": False}
    with config.patch(unsafe), torch._dynamo.config.patch(disable=True), torch.compiler.set_stance("force_eager"):
        with cache.environment(), inductor.pinned():
            assert "TORCHDYNAMO_DISABLE" not in os.environ
            assert not [key for key, value in unsafe.items() if config.get_config_copy()[key] == value]
            torch.compile(lambda x: x + 1, backend=lambda graph, _: graphs.append(graph) or graph.forward)(CPU_TENSOR)
        assert [key for key, value in unsafe.items() if config.get_config_copy()[key] == value] == list(unsafe)
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert len(graphs) == 1


def test_vector_instructions_are_taken_for_granted_on_x86_alone(monkeypatch):
    for machine, expected in (("x86_64", True), ("AMD64", True), ("aarch64", None), ("arm64", None)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert inductor.options().get("cpp.vec_isa_ok") is expected


@pytest.fixture
def clang(monkeypatch, tmp_path):
    """Makes clang++ the only C++ compiler on the PATH."""
    from torch._inductor import cpp_builder

    names = ("clang++", *(f"clang++-{version}" for version in range(30, 13, -1)))
    found = next(filter(None, map(shutil.which, names)), "")
    probe = (found, "-fopenmp", "-fsyntax-only", "-x", "c++", "-include", "omp.h", os.devnull)
    if not found or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("no clang++ with omp.h here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "clang++").symlink_to(found)
    (tmp_path / "bin" / "ld").symlink_to(shutil.which("ld"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CXX", raising=False)
    once_a_process = (cpp_builder.is_gcc, cpp_builder.is_clang, cpp_builder.is_apple_clang)
    for answer in once_a_process:  # which other tests have asked of g++
        answer.cache_clear()
    yield
    for answer in once_a_process:
        answer.cache_clear()


@pytest.mark.slow
def test_a_step_of_clang_is_compiled_with_the_patches(clang, places, monkeypatch, small_spec, step_inputs):
    """Clang maps the source, to which torch appends a comment meanwhile."""
    spec = small_spec(widths=[8], norm="none", dropout=0.0)
    state, data, hyper = step_inputs(spec)
    fresh, eager = clone(state), step.make_train_step(static(spec))(state, data, hyper)
    made = fused.fuse(spec, state, data, hyper)
    assert (made.mode, made.problem) == (Mode("compiled"), "")
    made.advance()
    assert_close(state, eager)
    monkeypatch.setattr(cache, "_build", None)
    fused.fuse(spec, fresh, data, hyper).advance()
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(state), tree.leaves(fresh), strict=True))


@compiles
@pytest.mark.slow
def test_if_a_patch_fails_the_step_is_compiled_without_patches(places, monkeypatch, small_spec, step_inputs):
    from torch._inductor import config

    def gone(scratch):
        raise AttributeError("no such name in this torch")

    monkeypatch.setattr(inductor, "parallel_builds", gone)
    spec = small_spec(widths=[8], norm="none", dropout=0.0)
    state, data, hyper = step_inputs(spec)
    eager = step.make_train_step(static(spec))(state, data, hyper)
    quick = (
        ("cpp.vec_isa_ok", True),
        ("aot_inductor.compile_wrapper_opt_level", "O0"),
        ("cpp_cache_precompile_headers", False),
    )
    with config.patch(dict(quick)):  # torch's own settings take 20 s more
        made = fused.fuse(spec, state, data, hyper)
    assert (made.mode, made.problem) == (Mode("unpatched"), "no such name in this torch")
    made.advance()
    assert_close(state, eager)
    again = fused.fuse(spec, *step_inputs(spec))
    assert (again.mode, again.problem) == (made.mode, made.problem), "a library from the cache hides how it was made"


# The cache, with libraries that are only bytes


class Places:
    """A cache of its own: `project`/.cache is preferred, then `home`/cifar10-mlp. Counts what is built in it. Its path
    needs quotes in a command line."""

    def __init__(self, folder):
        folder.mkdir()
        self.project, self.home, self.log = folder / "project", folder / "home", folder / "built"
        self.cache = self.project / ".cache"

    def recipe(self, build=lambda: None, name="0" * 32, inputs=(2, 0)):
        """A library, of two of three tensors; `build` is called when it is built."""

        def build_and_count(scratch):
            with open(self.log, "a") as log:
                log.write("built\n")
            build()
            (scratch / "x.so").write_bytes(b"library")
            return cache.Library(scratch / "x.so", list(inputs), "")

        return cache.Recipe(name, 3, build_and_count)

    def built(self):
        """How often something was built."""
        return len(self.log.read_text().split()) if self.log.exists() else 0

    def left(self):
        """What is in the preferred folder, by the last part of the name."""
        return {path.suffix for path in self.cache.iterdir()}

    def libraries(self):
        return sorted(self.project.parent.rglob("*.so"))


@pytest.fixture
def places(tmp_path, monkeypatch):
    found = Places(tmp_path / "a user's")
    monkeypatch.setattr(cache, "PROJECT", found.project)
    monkeypatch.setattr(cache, "_chosen", None)
    monkeypatch.setattr(cache, "_failed", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(found.home))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    return found


def test_a_library_is_built_once(places):
    recipe, environment = places.recipe(), dict(os.environ)
    assert cache.find(recipe) is None
    library = cache.get_or_build(recipe)
    assert (
        library == cache.get_or_build(recipe) == cache.find(recipe) == (places.cache / f"{recipe.name}.so", [2, 0], "")
    )
    assert library.path.read_bytes() == b"library"
    assert cache.problem() is None
    assert places.built() == 1
    assert os.environ == environment
    assert places.left() == {".so", ".json", ".lock"}


def test_the_temporary_folder_of_the_process_does_not_change(places, monkeypatch):
    """Python keeps the first answer. While a library is built, $TMPDIR is a folder that is removed afterwards."""
    expected = tempfile.gettempdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    cache.get_or_build(places.recipe(tempfile.gettempdir))
    assert tempfile.gettempdir() == expected


def test_threads_build_one_at_a_time_and_nothing_twice(places):
    at_work = []

    def build():
        assert not at_work
        at_work.append(1)
        time.sleep(0.1)
        at_work.clear()

    recipes = [places.recipe(build, name) for name in ("0" * 32, "1" * 32)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(cache.get_or_build, recipes * 2))
    assert found[:2] == found[2:]
    assert places.built() == 2


def test_only_new_libraries_go_to_the_chosen_folder(places, monkeypatch, tmp_path):
    """A library that is in the user's cache folder is used where it lies, and nothing is created anywhere."""
    monkeypatch.setenv(cache.VARIABLE, str(places.home / "cifar10-mlp"))
    cache.get_or_build(places.recipe())
    monkeypatch.setattr(cache, "_chosen", None)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "chosen"))
    assert cache.get_or_build(places.recipe()).path.parent == places.home / "cifar10-mlp"
    assert places.built() == 1
    assert not (tmp_path / "chosen").exists()
    assert cache.get_or_build(places.recipe(name="1" * 32)).path.parent == tmp_path / "chosen"
    assert places.built() == 2
    assert cache.problem() is None


def test_the_default_folder_of_torch_is_not_taken_for_a_choice_of_the_user(places, monkeypatch):
    """Importing Dynamo exports it, and it lies in a temporary folder."""
    monkeypatch.setenv(cache.VARIABLE, os.path.join(tempfile.gettempdir(), "torchinductor_me"))
    assert cache.folder() == places.cache


PROGRAM = """
import os, sys
before = dict(os.environ)
import torch
from core.compile import cache, fused, inductor
from core.functional import step
from core.spec import resolve
assert dict(os.environ) == before, "an import has changed the environment"
assert cache.problem() is None
spec = resolve({"widths": [8], "batch_size": 4})
images, labels = torch.zeros(8, 3072, dtype=torch.uint8), torch.arange(8)
data = {"images": images, "labels": labels, "order": torch.arange(8).view(2, 4)}
hyper = step.hyper_tensors(spec, 2)
fused.fuse(spec, step.init_state(spec), data, hyper, compiled=False).advance()
def build(scratch):
    (scratch / "x.so").write_bytes(b"library")
    return cache.Library(scratch / "x.so", [0], "")
library = cache.get_or_build(cache.Recipe("0" * 32, 3, build))
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
    assert problem == f"cannot use {unwritable} (Not a directory): compiled steps are kept in {folder}"
    folder, problem = second.splitlines()
    assert Path(folder).parent == tmp_path / "temporary"
    assert not Path(folder).exists(), "the temporary folder is left"
    reason = f"cannot use {project / '.cache'} (Not a directory)"
    assert problem == f"{reason}: compiled steps are kept in {folder} until this process ends"


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="no folder here that refuses everybody")
def test_a_folder_without_permission_is_skipped(places, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, "/sys/x")
    assert cache.folder() == places.home / "cifar10-mlp"
    assert re.fullmatch(r"cannot use /sys/x \(.*permi.*\): compiled steps are kept in (.*)", cache.problem(), re.I)
    assert cache.problem().endswith(f" {places.home / 'cifar10-mlp'}")


def test_a_folder_whose_files_others_can_change_is_skipped(places, monkeypatch):
    """Such as a file system where all files belong to one user, or may be written by everybody."""
    fstat = os.fstat

    def writable_by_all(descriptor):
        found = fstat(descriptor)
        there = os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(places.project))
        return os.stat_result((found.st_mode | 0o002, *found[1:])) if there else found

    monkeypatch.setattr(os, "fstat", writable_by_all)
    assert cache.get_or_build(places.recipe()).path.parent == places.home / "cifar10-mlp"
    assert cache.problem().startswith(f"cannot use {places.cache} (other users can change the files there): ")


def test_a_folder_that_no_library_can_be_loaded_from_is_skipped(places, monkeypatch):
    """Nor is a library that lies there used."""
    library = cache.get_or_build(places.recipe())
    statvfs = os.fstatvfs

    def noexec(descriptor):
        found = statvfs(descriptor)
        there = os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(places.project))
        return SimpleNamespace(f_flag=found.f_flag | os.ST_NOEXEC if there else found.f_flag & ~os.ST_NOEXEC)

    monkeypatch.setattr(os, "fstatvfs", noexec)
    monkeypatch.setattr(cache, "_chosen", None)
    assert cache.find(places.recipe()) is None
    assert cache.get_or_build(places.recipe()).path == places.home / "cifar10-mlp" / library.path.name
    assert cache.problem().startswith(f"cannot use {places.cache} (it is mounted noexec, ")


def test_a_user_without_a_name_and_a_home(places, monkeypatch):
    """As `docker run --user 12345` has it."""

    def nothing(*_):
        raise KeyError("getpwuid(): uid not found: 12345")

    def nowhere(*_):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("pwd.getpwuid", nothing)
    monkeypatch.setattr("platformdirs.user_cache_dir", nowhere)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    named = []
    assert cache.get_or_build(places.recipe(lambda: named.append(getpass.getuser()))).path.parent == places.cache
    assert named == ["nobody"]


def described(inputs, name="0" * 32):
    """A description of the library b"library", with the right hash."""
    digest = cache._hash(name, b"library", cache.Library(Path(), inputs, ""))
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
def test_a_damaged_library_is_rebuilt(places, damage):
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
    assert places.built() == 2


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
def test_a_library_that_another_user_can_write_is_rebuilt(places, suffix, take_over):
    recipe = places.recipe()
    path = cache.get_or_build(recipe).path.with_suffix(suffix)
    take_over(path)
    assert cache.find(recipe) is None, "a library that another user can write is loaded"
    assert cache.get_or_build(recipe).path == path.with_suffix(".so")
    assert path.stat().st_uid == os.geteuid()
    assert places.built() == 2


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


def test_a_failed_build_is_reported_in_one_line_and_not_repeated(places):
    """Where the project's path had a space, each run of a sweep compiled and failed anew."""
    for _ in range(2):
        with pytest.raises(cache.CompileError) as raised:
            cache.get_or_build(places.recipe(fail))
        assert str(raised.value) == "the linker is [31mmissing"
        assert places.built() == 1, "what had failed was built again"
    assert places.left() == {".lock"}
    assert cache.get_or_build(places.recipe(name="1" * 32))


def test_a_temporary_failure_is_tried_again(places):
    def no_space():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("Dynamo has failed") from error

    with pytest.raises(cache.CompileError, match=r"^Dynamo has failed$"):
        cache.get_or_build(places.recipe(no_space))
    assert cache.get_or_build(places.recipe()).inputs == [2, 0]
    killed = subprocess.CalledProcessError(-9, "g++", b"")
    refused = subprocess.CalledProcessError(1, "g++", b"x.cpp:1: error: no such thing")
    out_of_memory = RuntimeError("C++ compile error: g++: fatal error: Killed signal terminated program cc1plus")
    for error, expected in (
        (killed, True),
        (out_of_memory, True),
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (store.StoreError("cannot write"), True),
        (refused, False),
        (AttributeError("no such name in this torch"), False),
    ):
        assert cache.is_temporary(error) is expected, error


def test_a_temporary_failure_does_not_make_an_unpatched_library(places, monkeypatch, small_spec, step_inputs):
    """It would be used for ever, with other bits."""

    def lacking(_):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(inductor, "parallel_builds", lacking)
    spec = small_spec(widths=[8])
    with pytest.raises(fused.CompileError, match="Resource temporarily unavailable"):
        fused.fuse(spec, *step_inputs(spec))
    assert not places.libraries()


# Building that is stopped


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, promise):
    """Wait for it; the bound is for a machine that is busy with other things."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, promise
        time.sleep(0.01)


@pytest.fixture
def interrupt():
    """Sends SIGINT to this process as soon as a condition holds."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def send(condition):
        def wait():
            until(condition, "what is to be interrupted does not begin")
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=wait).start()

    yield send
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_build_ends_at_once_and_leaves_nothing(places, interrupt):
    """The compiler, which has started another process, hangs; torch is busy, writes one more file, and asks nobody."""
    pids, scratches, go_on, environment = places.home.parent / "pids", [], threading.Event(), dict(os.environ)

    def build(scratch):
        scratches.append(scratch)
        script = f'sleep 1000 & echo $$ $! > "{pids}.new"; mv "{pids}.new" "{pids}"; wait'
        subprocess.run(["sh", "-c", script, str(scratch / "x.cpp")], check=False)
        go_on.wait()
        (scratch / "late").mkdir(parents=True)

    interrupt(pids.exists)
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build(cache.Recipe("0" * 32, 3, build))
    assert time.time() - pids.stat().st_mtime < 10  # it hangs for 1,000 s
    compiler, its_child = map(int, pids.read_text().split())
    until(lambda: not is_running(compiler), "the compiler goes on")
    os.kill(its_child, signal.SIGKILL)  # Nothing says that it compiles in the scratch folder.
    assert places.left() == {".lock"}
    with store.locked(places.cache / f"{'0' * 32}.lock", timeout=0):
        pass
    go_on.set()
    assert cache.get_or_build(places.recipe()).inputs == [2, 0], "the next call does not work"
    assert places.left() == {".so", ".json", ".lock"}
    assert re.fullmatch(r"[\w/.+-]+", str(scratches[0])), "torch writes such a path into command lines without quotes"
    until(lambda: not scratches[0].exists(), "what was written late is left")
    assert os.environ == environment


def test_leftovers_of_a_killed_process_are_removed(places):
    """But not what another process still builds."""
    place, middle = cache._scratch_place(places.cache)
    mine, old, busy = (place / f"{digit * 32}.{middle}.abc.scratch" for digit in "012")
    for folder in (mine, old, busy):
        folder.mkdir(parents=True)
        (folder / "x.cpp").touch()
    with store.locked(places.cache / f"{'2' * 32}.lock"):
        cache.get_or_build(places.recipe())
    assert not [folder for folder in (mine, old) if folder.exists()]
    assert busy.exists()


def test_abandoned_work_ends_at_its_next_check(interrupt):
    started, ended = threading.Event(), threading.Event()

    def work():
        check = worker.checker()
        started.set()
        try:
            while True:
                time.sleep(0.01)
                check()
        except worker.Abandoned:
            ended.set()

    interrupt(started.is_set)
    with pytest.raises(KeyboardInterrupt):
        worker.wait_for(work)
    assert ended.wait(60)
    with pytest.raises(ZeroDivisionError):
        worker.wait_for(lambda: 1 / 0)


LEFT_BEHIND = """
import os, signal, time
from core.compile import worker

def work():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    worker.wait_for(work, lambda: print("stopped"))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_abandoned_work_ends_with_the_process():
    done = subprocess.run((sys.executable, "-c", LEFT_BEHIND), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (130, ["stopped", "interrupted", "stopped"]), done.stderr


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Makes a shell script the C++ compiler."""

    def make(script):
        path = tmp_path / "c++"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))

    return make


@pytest.mark.slow
def test_a_failing_compiler_is_quiet_and_not_called_again(places, compiler, capfd, tmp_path, small_spec, step_inputs):
    says = "fatal error: no such thing"
    log = tmp_path / "log"
    fails = f"echo In file x: >&2; echo x.h:1: {says} >&2; exit 1"
    compiler(f"echo $* >> {log}; case $* in *--version*) echo g++ 13;; *) {fails};; esac")
    spec = small_spec(widths=[8], norm="none", dropout=0.0)  # quick to compile, as it is tried twice
    with pytest.raises(fused.CompileError) as raised:
        fused.fuse(spec, *step_inputs(spec))
    assert says in str(raised.value)
    asked = log.read_text()
    for seed in (1, 2):
        with pytest.raises(fused.CompileError, match=says):
            fused.fuse({**spec, "seed": seed}, *step_inputs(spec))
    assert log.read_text() == asked, "what has failed was compiled again"
    assert len(str(raised.value).splitlines()) == 1
    assert capfd.readouterr() == ("", ""), "the C++ compiler has written to the terminal"


# Devices


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(DeviceError, match=f"^device {name} is not available; available: cpu$"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == CPU, "MPS, for which nothing is compiled, is for those who ask for it"
    assert pick_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_to_device_copies_the_tree():
    tree = {"a": {"b": torch.arange(3)}, "c": torch.tensor(1.0, dtype=torch.float64)}
    moved = to_device(tree, CPU)
    assert torch.equal(moved["a"]["b"], tree["a"]["b"])
    assert moved["c"].dtype == torch.float64
