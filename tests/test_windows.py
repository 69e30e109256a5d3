"""Every command under a simulation of Windows, by a user without a name and a home; see tests/windows.py."""

import os
import shlex
import signal
import subprocess
import sys
from importlib import util
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image

from core import signals, store
from core.compile import device
from tests import windows
from tests.conftest import OFFLINE, ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the simulation reads /proc")
HOME = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "USERPROFILE")


def test_every_command_works_on_windows(tmp_path):
    """In one process: without os.geteuid, fcntl and the like, in cp1252, with open files that cannot be replaced. Where
    this project opens text without an encoding, it ends in an error. There is no home folder, and the user has no name,
    as in some containers."""
    out, image = tmp_path / "out", tmp_path / "é.png"
    Image.new("RGB", (32, 32)).save(image)
    commands = {
        "--help": "usage: main.py",
        f"list --out {out}": "learning-rate (the default)",
        f"run demo epochs=1 --no-compile --out {out}": "demo seed 0: epoch 1",
        f"evaluate --out {out}": "as recorded",
        f"report --out {out}": "results.md rebuilt from 1 records",
        f"predict demo {image} --out {out}": "pattern-",
        f"verify demo epochs=1 --no-compile --out {out}": "the same bits",
        f"export demo --format torch --out {out}": "within 1e-05",
        f"diff demo demo --out {out}": "The weights are the same, bit for bit",
        f"compare 'demo epochs=1 widths=8' 'demo epochs=1 widths=9' --within 100 --max-seeds 5 --out {out}": "5 seeds",
        f"clean --out {out}": "nothing",
    }
    words = shlex.split(" , ".join(commands))
    env = {key: value for key, value in os.environ.items() if key not in HOME}
    env |= {**OFFLINE, "MPLCONFIGDIR": matplotlib.get_cachedir(), "COLUMNS": "200"}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")  # the cache of this checkout may hold steps of older code
    done = subprocess.run(
        (sys.executable, "-X", "warn_default_encoding", ROOT / "tests" / "windows.py", *words),
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="cp1252",
    )
    said = done.stdout.split("\n[0]\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(said) == len(commands) + 1, done.stdout + done.stderr
    for (command, expected), text in zip(commands.items(), said, strict=False):
        assert expected in text, (command, text, done.stderr)
    assert {path.suffix for path in out.glob("checkpoints/demo/*")} >= {".json", ".lock", ".pt2", ".safetensors"}
    assert (out / "checkpoints" / "learning-curves.svg").exists()
    assert not [path for kind in ("tmp", "owner", "step-*") for path in out.rglob(f"*.{kind}")]


def test_the_simulation_takes_away_what_windows_has_not():
    assert windows.lacks("os") >= {"fork", "geteuid", "uname", "O_NONBLOCK", "O_CLOEXEC", "posix_fallocate"}
    assert windows.lacks("signal") >= {"SIGHUP", "SIGKILL", "SIGCONT", "pthread_sigmask"}
    assert windows.lacks("json") == frozenset()
    for name in ("fcntl", "pwd", "resource", "termios"):
        assert windows.lacks(name) is None
    module = windows.on_windows(os)
    assert (module.name, hasattr(module, "fork"), hasattr(os, "fork")) == ("nt", False, True)


def test_a_file_that_is_open_is_replaced_when_it_is_closed(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    path.write_bytes(b"old")
    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, windows.refuse_if_open(getattr(os, name)))
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    with path.open(), pytest.raises(store.StoreError, match="another program has it open"):
        store.atomic_write(path, b"new")
    with path.open(), pytest.raises(store.StoreError, match="another program has it open"):
        store.delete(path)
    store.atomic_write(path, b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]
    store.delete(path)
    with pytest.raises(PermissionError):
        windows.open_as_on_windows(tmp_path)
    assert windows.open_descriptor(os.devnull, os.O_RDONLY) > 2


def test_a_build_without_cuda_beside_an_nvidia_driver_is_said(monkeypatch, caplog):
    """PyPI's build for Windows has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device.shutil, "which", {"nvidia-smi": "/bin/nvidia-smi"}.get)
    for built_for, said in (("13.0", []), (None, [device.NO_CUDA])):
        monkeypatch.setattr(torch.version, "cuda", built_for)
        assert device.pick_device("auto").type != "cuda"
        assert caplog.messages == said
        with pytest.raises(device.DeviceError) as refused:
            device.pick_device("cuda")
        assert str(refused.value).endswith(f"; {device.NO_CUDA}") == bool(said)
    monkeypatch.setattr(device.shutil, "which", {}.get)
    with pytest.raises(device.DeviceError, match=r"available: [a-z, ]+$"):
        device.pick_device("cuda")


def test_ctrl_break_stops_as_sigterm_does(monkeypatch):
    """SIGBREAK is on Windows alone; here SIGUSR1 plays it."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    spec = util.spec_from_file_location("signals", signals.__file__)
    on_windows = util.module_from_spec(spec)
    spec.loader.exec_module(on_windows)
    before = {number: signal.getsignal(number) for number in on_windows.STOPS}
    stop = on_windows.Stop()
    try:
        stop.install()
        stop.importing, stop.stepping = False, True
        signal.raise_signal(signal.SIGUSR1)
        assert stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
