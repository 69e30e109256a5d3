"""What a record says of where it was made: the hash of the code that decides bits, the settings, what has changed."""

import os
import platform
import re
import shutil

import msgspec
import pytest
import torch

from core.code_hash import CODE, code_hash
from core.mode import COMPILED, Mode
from core.runs import provenance
from core.runs.provenance import SETTINGS, difference, environment
from core.runs.record import Environment
from tests.conftest import ROOT

CPU, EAGER = torch.device("cpu"), Mode("eager")


@pytest.fixture
def core(tmp_path):
    """A copy of core/."""
    return shutil.copytree(ROOT / "core", tmp_path / "core", ignore=shutil.ignore_patterns("__pycache__"))


def replace(path, old, new):
    text = path.read_text()
    assert old in text, f"{path} has no {old!r} to change"
    path.write_text(text.replace(old, new))


# The code that decides bits


@pytest.mark.parametrize("folder", ["", "functional", "data", "compile", "functional/deeper", "a_folder_of_tomorrow"])
def test_a_new_file_counts_from_its_first_day(core, folder):
    hashes = [code_hash(core)]
    (core / folder).mkdir(exist_ok=True)
    path = core / folder / "new.py"
    for text in ("RATE = 0.5\n", "RATE = 0.25\n"):
        path.write_text(text)
        hashes.append(code_hash(core))
    path.rename(path.with_name("new_.py"))
    hashes.append(code_hash(core))
    assert len(set(hashes)) == 4, "without it, with it, with another constant, under another name"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("functional/optim.py", "MOMENTUM = 0.9", "MOMENTUM = 0.8"),
        ("spec.py", "held_out: int = 500", "held_out: int = 501"),
        ("compile/fused.py", "fullgraph=True", "fullgraph=False"),
        ("train.py", "+= 1", "-= 1"),
        ("__init__.py", "AUTO,STRICT", "AUTO"),
        ("spec.py", "1e-3", "2e-3"),  # a default
    ],
)
def test_a_changed_constant_counts(core, name, old, new):
    before = code_hash(core)
    replace(core / name, old, new)
    assert code_hash(core) != before


def test_comments_and_layout_do_not_count(core):
    path = core / "functional" / "new.py"
    path.write_text("class A:\n    def f(self, x):\n        return x + 1\n")
    before = code_hash(core)
    path.write_text(
        '"""A module."""\n\n# A comment.\n\n\nclass A:\n    """A class."""\n\n    def f(self, x):\n'
        '        """A function."""\n        return (  # in parentheses\n            x + 1\n        )\n'
    )
    assert code_hash(core) == before
    path.write_text("class A:\n    def f(self, x):\n        return x + 2\n")
    assert code_hash(core) != before


def test_a_text_that_is_no_docstring_counts(core):
    path = core / "functional" / "new.py"
    path.write_text('KIND = "adam"\n')
    before = code_hash(core)
    path.write_text('KIND = "sgd"\n')
    assert code_hash(core) != before


def test_code_that_decides_no_bit_does_not_count(core):
    """A new column in a report must not keep a run from going on."""
    before = code_hash(core)
    for name in ("commands", "listeners", "runs", "report"):
        (core / name / "new.py").write_text("x = 1\n")
        (core / name / "deeper").mkdir()
        (core / name / "deeper" / "new.py").write_text("x = 1\n")
    names = (
        "cli code_hash errors estimate events export images mode plan predict remote schedule session signals store "
        "tally terminal verify"
    )
    for name in (f"{name}.py" for name in names.split()):
        with open(core / name, "a") as file:
            file.write("x = 1\n")
    (core / "functional" / "notes.txt").write_text("x = 1\n")
    assert code_hash(core) == before


def test_the_hash_does_not_depend_on_where_the_code_is(core):
    elsewhere = core.parent / "elsewhere" / "core"
    shutil.copytree(core, elsewhere)
    assert code_hash(elsewhere) == code_hash(core)
    assert re.fullmatch("[0-9a-f]{12}", CODE)


# Settings and what has changed


@pytest.fixture
def settings(monkeypatch):
    """A function that sets environment variables, as a run starts with them: none but MKL_CBWR."""
    for name in (*SETTINGS, "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_CBWR", "AUTO,STRICT")
    return monkeypatch.setenv


def test_a_run_that_starts_twice_would_repeat(settings):
    assert environment(CPU, EAGER).settings == "MKL_CBWR=AUTO,STRICT"
    assert difference(environment(CPU, EAGER), environment(CPU, EAGER)) is None


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_recorded_and_its_change_is_named(settings, name):
    then = environment(CPU, EAGER)
    settings(name, "COMPATIBLE")
    now = environment(CPU, EAGER)
    assert f"{name}=COMPATIBLE" in now.settings
    assert difference(then, now) == f"settings MKL_CBWR=AUTO,STRICT (now {now.settings})"


def test_options_of_the_compiler_are_a_setting(settings):
    settings("CXX", "ccache g++")
    assert "CXX" not in environment(CPU, COMPILED).settings
    settings("CXX", "g++ -ffast-math")
    assert environment(CPU, COMPILED).settings.endswith("CXX=g++ -ffast-math")


def test_a_record_that_is_older_than_the_settings_was_made_with_the_default(settings):
    """core/__init__.py has set it since the first version."""
    now = environment(CPU, EAGER)
    older = msgspec.to_builtins(now)
    del older["settings"]
    assert difference(msgspec.convert(older, Environment), now) is None
    settings("MKL_CBWR", "COMPATIBLE")
    changed = difference(msgspec.convert(older, Environment), environment(CPU, EAGER))
    assert changed == "settings MKL_CBWR=AUTO,STRICT (now MKL_CBWR=COMPATIBLE)"


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("code", "0123456789ab", True),
        ("torch", "1.0", True),
        ("device", "cuda", True),
        ("hardware", "x86_64 AVX2000", True),
        ("mode", "compiled", True),
        ("settings", "", True),
        ("device_name", "Another processor", False),
        ("threads", 77, False),
        ("python", "3.99", False),
        ("git", "0123456789ab", False),
        ("diff", 64 * "0", False),
    ],
)
def test_only_changes_that_decide_bits_are_named(settings, key, value, named):
    now = environment(CPU, EAGER)
    then = msgspec.structs.replace(now, **{key: value})
    expected = f"{key} {value or 'unknown'} (now {getattr(now, key)})" if named else None
    assert difference(then, now) == expected


def test_every_field_of_an_environment_is_covered():
    """A new one belongs to the test above, and perhaps to DECIDE_BITS."""
    known = "code torch device hardware mode settings device_name threads python git diff"
    assert set(Environment.__struct_fields__) == set(known.split())


def test_an_environment_can_be_recorded_whatever_the_variables_say(settings):
    for name in SETTINGS:
        settings(name, "\x1b[31m\n\u202e\udc80" + "x" * 3000)
    now = environment(CPU, EAGER)
    assert now.settings.isprintable()
    assert msgspec.convert(msgspec.to_builtins(now), Environment) == now


# The chip


def cpuinfo(**of):
    """The text of /proc/cpuinfo with two processors; the second has another maker."""
    first = [f"{name.replace('_', ' ')}\t: {value}" for name, value in of.items()]
    return "\n".join(["processor\t: 0", *first, "", "processor\t: 1", *first[:-1], f"{first[-1]}?", ""])


X86 = cpuinfo(vendor_id="AuthenticAMD", model_name="AMD EPYC: 9B14").replace("vendor id", "vendor_id")
SYSCTL = "#!/bin/sh\n[ \"$*\" = '-n machdep.cpu.brand_string' ] && echo Apple M2\n"


@pytest.mark.parametrize(
    ("text", "sysctl", "name", "maker"),
    [
        (X86, SYSCTL, "AMD EPYC: 9B14", "AuthenticAMD"),
        (cpuinfo(CPU_implementer="0x41", CPU_part="0xd40"), SYSCTL, *2 * ("CPU implementer 0x41, CPU part 0xd40",)),
        (None, SYSCTL, "Apple M2", "Apple M2"),
        (None, "#!/bin/sh\nexit 1\n", "arm", "arm"),
        (None, None, "arm", "arm"),
        ("Features\t: fp asimd\n", None, "arm", "arm"),
    ],
    ids=["x86 Linux", "arm64 Linux", "macOS", "an older macOS", "no sysctl", "an unknown Linux"],
)
def test_two_generations_of_chips_have_two_names(monkeypatch, tmp_path, text, sysctl, name, maker):
    """macOS and arm64 Linux give "arm" or nothing as the name of any processor."""
    (tmp_path / "cpuinfo").write_text(text or "")
    if sysctl:
        (tmp_path / "sysctl").write_text(sysctl)
        (tmp_path / "sysctl").chmod(0o755)
    monkeypatch.setattr(provenance, "Path", lambda _: tmp_path / ("cpuinfo" if text else "missing"))
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    monkeypatch.setenv("PATH", str(tmp_path))
    now = environment(CPU, EAGER)
    assert now.device_name == f"{name}, {os.cpu_count()} cores"
    capability = torch.backends.cpu.get_cpu_capability()
    assert now.hardware.startswith(f"{platform.machine()} {maker} {capability}")
