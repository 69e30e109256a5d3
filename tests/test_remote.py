"""Runs on a Ray cluster of two nodes on this machine: nothing but time depends on who trains, or on who dies."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from core import remote
from core.runs.record import Failed, Finished, encode, read_record, read_records
from core.runs.store import StoreError
from core.session import run_experiment
from core.spec import spec_id
from tests.conftest import ROOT, lacking
from tests.test_report import make

# Keeps a cluster until its standard input ends. A line there is a command: "kill" takes a node away without grace.
CLUSTER = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
    other = cluster.add_node(num_cpus=1)
    print("killed", flush=True)
cluster.shutdown()
"""

# Trains small runs on invented images; says each record, and where workers are.
DRIVER = """
import json, sys
from pathlib import Path
import torch
from core import remote
from core.data.cifar10 import Cifar10
from core.spec import resolve

address, out, epochs, count, changed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
generator = torch.Generator().manual_seed(5)
images, labels = torch.randint(0, 256, (6100, 3072), generator=generator, dtype=torch.uint8), torch.arange(6100) % 10
data = Cifar10(images[:6000], labels[:6000], images[6000:], labels[6000:])
spec = {"widths": [32, 16], "batch_size": 64, "epochs": epochs}
groups = [[("x", resolve({**spec, "seed": seed}))] for seed in range(count)]
if changed == "diverges":
    groups[1] = [("x", {**groups[1][0][1], "lr": 1e30, "optimizer": "sgd", "norm": "none"})]
if changed == "software":
    remote.SOFTWARE = remote.SOFTWARE._replace(torch="0.1")
try:
    for record in remote.train(groups, out, data, address, compiled=False):
        print(json.dumps([record.seed, getattr(record, "digest", None)]), flush=True)
except remote.ClusterError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.fixture(scope="module")
def cluster():
    if importlib.util.find_spec("ray") is None:
        lacking("Ray is not installed: uv run --group ray pytest")
    process = subprocess.Popen(
        (sys.executable, "-c", CLUSTER),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process.address = next(line.strip() for line in process.stdout if ":" in line)
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def driver(cluster, tmp_path):
    """Starts a process that trains on the cluster; its lines are JSON."""
    started = []

    def start(out="out", epochs=1, count=3, changed=""):
        command = sys.executable, "-c", DRIVER, cluster.address, str(tmp_path / out), str(epochs), str(count), changed
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return dict(json.loads(line) for line in out.splitlines())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, invented, small_spec):
    """The digests of the runs, trained in this process."""
    out = tmp_path_factory.mktemp("alone")

    def digest(epochs, seed):
        return run_experiment("x", small_spec(epochs=epochs, seed=seed), out, invented, "cpu", compiled=False).digest

    return digest


def workers():
    """The processes that train, on all nodes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found += [int(path.parent.name)] * path.read_bytes().startswith(b"ray::work")
    return found


def written(out):
    """When the records under a folder were written, by their seeds."""
    paths = (out / "checkpoints" / "x").glob("*.json")
    return {read_record(path).seed: path.stat().st_mtime_ns for path in paths}


def until(condition):
    end = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_the_files_are_those_of_runs_here(driver, alone, tmp_path):
    expected = {seed: alone(1, seed) for seed in range(3)}
    assert ended(driver()) == expected
    records = list(read_records(tmp_path / "out"))
    assert len(records) == 3
    for record in records:
        assert record.environment.threads == 1
        names = {path.name for path in (tmp_path / "out" / "checkpoints" / "x").glob(f"{record.spec_id}*")}
        assert names >= {f"{record.spec_id}.json", f"{record.spec_id}.safetensors"}
    before = written(tmp_path / "out")
    assert ended(driver()) == expected
    assert written(tmp_path / "out") == before, "what is finished was trained again"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["node", "worker"])
def test_a_node_or_a_worker_that_is_killed_costs_time_alone(cluster, driver, alone, what):
    process = driver(f"{what}-killed", epochs=15)
    until(lambda: len(workers()) == 2)
    if what == "node":
        cluster.stdin.write("kill\n")
        cluster.stdin.flush()
        until(lambda: cluster.stdout.readline().strip() == "killed")
    else:
        os.kill(workers()[0], signal.SIGKILL)
    assert ended(process) == {seed: alone(15, seed) for seed in range(3)}


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_with_what_is_missing(driver, alone, tmp_path):
    process = driver("driver-killed", epochs=15, count=4)
    process.stdout.readline()
    process.kill()
    process.wait()
    before = written(tmp_path / "driver-killed")
    assert 1 <= len(before) < 4
    assert ended(driver("driver-killed", epochs=15, count=4)) == {seed: alone(15, seed) for seed in range(4)}
    after = written(tmp_path / "driver-killed")
    assert after.keys() == set(range(4))
    assert before.items() <= after.items(), "what is finished was trained again"


@pytest.mark.slow
def test_a_run_that_diverges_is_a_record(driver, tmp_path):
    found = ended(driver("nan", changed="diverges"))
    assert found.keys() == {0, 1, 2}
    assert found[1] is None
    kinds = {record.seed: type(record) for record in read_records(tmp_path / "nan")}
    assert kinds == {0: Finished, 1: Failed, 2: Finished}


@pytest.mark.slow
def test_a_worker_with_other_software_refuses(driver):
    process = driver("refused", changed="software")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("refused: a worker on ")
    assert "has another torch " in err


def test_without_ray_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(remote.ClusterError, match="uv run --group ray"), remote.connected("local"):
        pass


def test_sigterm_is_handled_as_before(monkeypatch):
    """Ray replaces the handler when it connects."""

    def init(*_, **__):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))

    ray = types.SimpleNamespace(init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with remote.connected("local"):
            assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("asked", "gpus", "chosen"), [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda")]
)
def test_the_device_is_one_that_the_cluster_has(asked, gpus, chosen):
    assert remote._device(asked, {"CPU": 4, "GPU": gpus}) == chosen


@pytest.mark.parametrize("asked", ["cuda", "mps"])
def test_a_device_that_the_cluster_lacks_is_refused(asked):
    with pytest.raises(remote.ClusterError, match=r"^the cluster has no "):
        remote._device(asked, {"CPU": 4})


def test_what_a_worker_returns_is_written_whole_or_refused(tmp_path):
    record = make("x")
    path = tmp_path / "checkpoints" / "x" / f"{spec_id(record.spec)}"
    path.parent.mkdir(parents=True)  # as the lock of the run does
    assert remote.keep(tmp_path, remote.Trained(encode(record), b"weights")) == record
    assert read_record(path.with_suffix(".json")) == record
    assert path.with_suffix(".safetensors").read_bytes() == b"weights"
    (again := path.with_suffix(".safetensors")).unlink()
    again.mkdir()  # it cannot be written
    with pytest.raises(StoreError, match="cannot write"):
        remote.keep(tmp_path, remote.Trained(encode(record), b"others"))
    assert read_record(path.with_suffix(".json")) == record, "a result was lost before there was another"
    again.rmdir()
    assert remote.keep(tmp_path, remote.Trained(encode(record), b"others")) == record
    assert again.read_bytes() == b"others"
    with pytest.raises(StoreError, match="a worker returned no record"):
        remote.keep(tmp_path, remote.Trained(b"{}", b""))
    failed = Failed(
        **{key: getattr(record, key) for key in ("name", "spec", "spec_id", "seed", "data", "environment")}, error="no"
    )
    remote.keep(tmp_path, remote.Trained(encode(failed), b""))
    assert read_record(path.with_suffix(".json")) == record, "a failure has replaced a result"
