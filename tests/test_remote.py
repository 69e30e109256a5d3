"""Runs on a Ray cluster of two nodes on this machine: a worker or node that dies costs only time. Rare failures are
simulated."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest
import safetensors.torch
from msgspec.structs import replace

from core import cli, cluster, remote, run_experiment
from core.data import datasets
from core.data.identity import data_identity
from core.errors import UserError
from core.events import OnCluster
from core.runs.record import Failed, Finished, decode, encode, read_record, read_records
from core.runs.run import Run
from core.session import TooLarge
from core.store import StoreError
from main import PROJECT
from tests.conftest import ROOT, lacking
from tests.test_report import make

# Keeps a cluster until its standard input ends. Says its address, and the process of its second node. A line in its
# input is a command: "kill" takes that node away without grace.
CLUSTER = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
raylet = other.all_processes["raylet"][0].process.pid
print(cluster.address, raylet, flush=True)
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
from core.data.tensors import Data
from core.runs.run import Run

address, out, epochs, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
generator = torch.Generator().manual_seed(5)
images, labels = torch.randint(0, 256, (6100, 3072), generator=generator, dtype=torch.uint8), torch.arange(6100) % 10
data = Data(images[:6000], labels[:6000], images[6000:], labels[6000:])
spec = {"widths": [32, 16], "batch_size": 64, "epochs": epochs}
groups = [[Run("x", {**spec, "seed": seed}, out)] for seed in range(count)]
for record in remote.train(groups, data, address, compiled=False):
    print(json.dumps([record.seed, record.digest]), flush=True)
"""


@pytest.fixture(scope="module")
def two_nodes():
    if importlib.util.find_spec("ray") is None:
        lacking("Ray is not installed: uv run --group ray pytest")
    process = subprocess.Popen(
        (sys.executable, "-c", CLUSTER),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    process.address, node = next(line.split() for line in process.stdout if ":" in line)
    process.node = int(node)
    yield process
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def driver(two_nodes, tmp_path):
    """Starts a process that trains on the cluster; its lines are JSON."""
    started = []

    def start(out, epochs, count):
        command = sys.executable, "-c", DRIVER, two_nodes.address, str(tmp_path / out), str(epochs), str(count)
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


def workers(two_nodes):
    """The processes that train, by the process of their node."""
    found = {}
    for process in psutil.Process(two_nodes.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::task"):
                found[process.ppid()] = process.pid
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
def test_a_killed_worker_node_or_driver_costs_only_time(two_nodes, driver, alone, tmp_path):
    """A worker, the node of the other worker, and then the driver are killed. Another driver trains what is missing.
    All files equal those of runs here."""
    count, epochs = 5, 10
    process = driver("out", epochs, count)
    until(lambda: len(workers(two_nodes)) == 2)
    [elsewhere] = [worker for node, worker in workers(two_nodes).items() if node != two_nodes.node]
    os.kill(elsewhere, signal.SIGKILL)
    two_nodes.stdin.write("kill\n")
    two_nodes.stdin.flush()
    until(lambda: two_nodes.stdout.readline().strip() == "killed")
    assert process.stdout.readline(), "no run was trained again"
    process.kill()
    process.wait()
    before = written(tmp_path / "out")
    assert 1 <= len(before) < count

    expected = {seed: alone(epochs, seed) for seed in range(count)}
    assert ended(driver("out", epochs, count)) == expected
    after = written(tmp_path / "out")
    assert after.keys() == expected.keys()
    assert before.items() <= after.items(), "what is finished was trained again"
    for record in read_records(tmp_path / "out"):
        assert record.environment.threads == 1
        names = {path.name for path in (tmp_path / "out" / "checkpoints" / "x").glob(f"{record.spec_id}*")}
        assert names >= {f"{record.spec_id}.json", f"{record.spec_id}.safetensors"}


@pytest.mark.slow
def test_a_local_cluster_and_then_another_in_an_empty_home(tmp_path):
    """The two commands of docs/cluster.md, one after the other."""
    if importlib.util.find_spec("ray") is None:
        lacking("Ray is not installed: uv run --group ray pytest")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": str(tmp_path)}

    def train(address):
        command = sys.executable, "-c", DRIVER, address, str(tmp_path / address[:5]), "1", "1"
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240)

    here = train("local")
    assert here.returncode == 0, here.stderr
    assert not (tmp_path / ".ray").exists()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = Path(sys.executable).with_name("ray")
    options = "--head", "--block", "--num-cpus", "1", "--include-dashboard", "false", "--disable-usage-stats"
    head = subprocess.Popen(
        (program, "start", *options, "--port", address.split(":")[1]),
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: cluster.silent(address, timeout=1) is None)
        there = train(address)
        assert there.returncode == 0, there.stderr
        assert there.stdout == here.stdout
    finally:
        head.terminate()
        head.wait(60)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ((3, 13), "Ray is not installed: `uv run --group ray main.py ...` has it"),
        ((3, 14), "Ray has no wheels for Python 3.14: `uv run --python 3.13 --group ray main.py ...` has it"),
    ],
)
def test_without_ray_a_sentence_names_the_command_that_installs_it(monkeypatch, version, words):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sys, "version_info", version)
    with pytest.raises(cluster.ClusterError, match=re.escape(words)), cluster.connected("local"):
        pass


class Errors(types.SimpleNamespace):
    """The part of ray.exceptions that core/cluster.py and core/remote.py name."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        def __init__(self, cause):
            self.cause = cause

    class NodeDiedError(RayError):
        pass

    class ObjectLostError(RayError):
        pass

    class WorkerCrashedError(RayError):
        pass

    class OutOfMemoryError(RayError):
        pass


ERRORS = Errors()


@pytest.fixture
def ray(monkeypatch):
    """A stand-in for the module ray, without a cluster."""

    def find(address):
        return None if address == "local" else address

    module = types.SimpleNamespace(init=lambda *_, **__: None, shutdown=lambda: None, exceptions=ERRORS)
    services = types.SimpleNamespace(canonicalize_bootstrap_address=find)
    module._private = types.SimpleNamespace(services=services)
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setattr(cluster.os, "environ", dict(os.environ))  # what is set for Ray stays in this test
    return module


def test_sigterm_is_handled_as_before(ray):
    """Ray replaces the handler when it connects."""
    ray.init = lambda *_, **__: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with cluster.connected("local"):
            assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("address", ["", " ", "ray://127.0.0.1:10001"])
def test_an_empty_address_and_another_protocol_are_refused(ray, address):
    ray.init = lambda *_, **__: pytest.fail("a cluster was started")
    with pytest.raises(cluster.ClusterError, match="expected HOST:PORT"), cluster.connected(address):
        pass


def test_an_empty_option_does_not_mean_this_machine():
    with pytest.raises(UserError, match="--ray has an empty address"):
        cli.parse(["run", "baseline", "--ray", ""], PROJECT)
    assert cli.parse(["run", "baseline", "--ray"], PROJECT).ray == cluster.LOCAL
    assert cli.parse(["run", "baseline"], PROJECT).ray is None


@pytest.fixture
def port():
    """Starts a server that sends each client these bytes; gives its address."""
    with contextlib.ExitStack() as stack:

        def start(answer):
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        client = stack.enter_context(server.accept()[0])
                        client.sendall(answer)

            threading.Thread(target=serve, daemon=True).start()
            return f"127.0.0.1:{server.getsockname()[1]}"

        yield start


SETTINGS_OF_HTTP2 = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # the first frame of a gRPC server


def test_a_head_that_does_not_answer_is_detected(port):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert cluster.silent(address, timeout=0.2) == "no answer within 0.2 s"  # it accepts, and is silent
    assert cluster.silent(address, timeout=5) == "Connection refused"
    assert cluster.silent(port(b"HTTP/1.1 400 Bad Request\r\n"), timeout=5) == "what answers there is no Ray cluster"
    assert cluster.silent(port(b""), timeout=0.2) == "no answer within 0.2 s"
    assert cluster.silent("no-such-host.invalid:1", timeout=5)
    assert cluster.silent(port(SETTINGS_OF_HTTP2), timeout=5) is None


@pytest.mark.parametrize(
    ("answer", "raised", "said"),
    [
        (b"", None, "no Ray cluster at 127.0.0.1:[0-9]+: no answer within 0.2 s"),
        (b"HTTP/1.1 400 ", None, "no Ray cluster at 127.0.0.1:[0-9]+: what answers there is no Ray cluster"),
        (
            SETTINGS_OF_HTTP2,
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n    Python: 3.12.1\n"),
            "Version mismatch: The cluster was started with: Ray: 2.1.0 Python: 3.12.1: every node needs the Ray and",
        ),
        (SETTINGS_OF_HTTP2, ERRORS.RayError("RPC error: InvalidAuthToken: ..."), "it demands a token: copy"),
    ],
)
def test_an_unusable_cluster_is_reported_in_a_sentence(ray, port, monkeypatch, answer, raised, said):
    def init(*_, **__):
        raise raised

    ray.init = init
    monkeypatch.setattr(cluster, "FIRST_ANSWER", 0.2)
    with pytest.raises(cluster.ClusterError, match=said) as error, cluster.connected(port(answer)):
        pass
    assert "\n" not in str(error.value)


def test_a_local_cluster_leaves_no_token_behind(ray, tmp_path, monkeypatch):
    """With one in the home folder, `ray start` demands it of everybody."""
    environ = cluster.os.environ
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        environ.pop(name, None)
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster._choose_token("10.0.0.1:6379")
    assert not environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"}, "a cluster without tokens is used without"
    cluster._choose_token("local")
    assert len(environ.pop("RAY_AUTH_TOKEN")) == 64, "Ray would write one into the home folder"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine")
    cluster._choose_token("local")
    assert "RAY_AUTH_TOKEN" not in environ, "the user's own would be replaced"
    cluster._choose_token("10.0.0.1:6379")
    assert environ["RAY_AUTH_MODE"] == "token", "`ray start` demands it now"


@pytest.mark.parametrize(
    ("asked", "gpus", "chosen"), [("auto", 0, "cpu"), ("auto", 2, "cuda"), ("cpu", 2, "cpu"), ("cuda", 2, "cuda")]
)
def test_the_device_is_one_that_the_cluster_has(asked, gpus, chosen):
    assert remote._device(asked, {"CPU": 4, "GPU": gpus}) == chosen


@pytest.mark.parametrize("asked", ["cuda", "mps"])
def test_a_device_that_the_cluster_lacks_is_refused(asked):
    with pytest.raises(cluster.ClusterError, match=r"^the cluster has no "):
        remote._device(asked, {"CPU": 4})


def test_a_worker_without_the_same_project_reports_it(tmp_path):
    """The task is sent with its code: a worker cannot import it by its name."""
    if importlib.util.find_spec("ray") is None:
        lacking("Ray is not installed: uv run --group ray pytest")
    cloudpickle = importlib.import_module("ray.cloudpickle")
    task = cloudpickle.dumps(remote.by_value())
    source = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())(('a', 'b'), 1, 2))"
    there = subprocess.run(
        (sys.executable, "-I", "-c", source), input=task, cwd=tmp_path, capture_output=True, check=True, timeout=60
    )
    said = there.stdout.decode()
    assert said.startswith("a worker on ")
    assert "cannot import this project (ModuleNotFoundError: No module named 'core'): every node needs" in said
    assert remote.by_value()((remote.SOFTWARE.code, "0.1"), 1, 2).split(", ")[1] == (
        f"{remote.SOFTWARE.torch} (here 0.1): every node needs this project in the same folder"
    )
    assert "has other code or another torch, " in remote.by_value()(("0", remote.SOFTWARE.torch), 1, 2)


def test_a_worker_must_have_every_byte_of_core():
    assert remote.SOFTWARE.code == importlib.import_module("core.code_hash").core_bytes_hash()


@pytest.fixture(scope="module")
def returned(invented, small_spec):
    """What a worker returns for a run, once for all tests that alter it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(remote, "_mapped", lambda *stored: invented)
        monkeypatch.setattr(remote.torch, "set_num_threads", lambda count: None)
        run = Run("x", small_spec(epochs=1), "nowhere")
        [trained] = remote.work([(run.name, run.spec)], [None], "cpu", compiled=False)
    return run, trained


def change(record, **changes):
    """A record with some keys changed, those of its spec and environment among them."""
    environment = {key: changes.pop(key) for key in ("code", "torch") if key in changes}
    return replace(record, environment=replace(record.environment, **environment), **changes)


def fewer(record):
    """The record of a run that was tested on one image less."""
    test = record.metrics.test
    hit = next(i for i in range(10) if test.count[i] > test.correct[i])
    count = [n - (i == hit) for i, n in enumerate(test.count)]
    test = replace(test, n=test.n - 1, count=count, accuracy=sum(test.correct) / (test.n - 1))
    return replace(record, metrics=replace(record.metrics, test=test), answers=remote.records.UNSET)


@pytest.mark.parametrize(
    ("what", "alter"),
    [
        ("name", lambda record: change(record, name="y")),
        ("id", lambda record: change(record, spec_id="0" * 12)),
        ("spec.lr", lambda record: change(record, spec={**record.spec, "lr": 0.5})),
        ("spec.seed", lambda record: change(record, spec={**record.spec, "seed": 7}, seed=7)),
        ("code", lambda record: change(record, code="0" * 12)),
        ("torch", lambda record: change(record, torch="0.1")),
        ("data", lambda record: change(record, data="tensors-0")),
        ("images", fewer),
        ("digest", lambda record: change(record, digest="0" * 64)),
    ],
)
def test_a_result_of_another_run_is_refused(returned, invented, what, alter):
    run, trained = returned
    named, record = data_identity(invented), decode(trained.record)
    sizes = functools.partial(remote.split_sizes, invented)
    assert remote.check(run, trained, named, sizes) == record
    with pytest.raises(
        cluster.ClusterError, match=f"^a worker returned x seed 0 with {what} .*, expected .* not kept$"
    ):
        remote.check(run, trained._replace(record=encode(alter(record))), named, sizes)


def test_an_invalid_result_is_refused(returned, invented):
    run, trained = returned
    named = data_identity(invented)
    sizes = functools.partial(remote.split_sizes, invented)
    tensors = safetensors.torch.load(trained.weights)
    first = next(iter(tensors))
    others = safetensors.torch.save(tensors | {first: -tensors[first]})
    for weights in (b"", trained.weights[:-4], others):
        with pytest.raises(cluster.ClusterError, match=r"it is not kept$"):
            remote.check(run, trained._replace(weights=weights), named, sizes)
    longer = json.loads(trained.record)
    longer["history"] = {key: [*column, 2] for key, column in longer["history"].items()}
    stopped = {**json.loads(trained.record), "status": "partial"}
    for bad in (b"{}", b"", json.dumps(longer).encode(), json.dumps(stopped).encode()):
        with pytest.raises(cluster.ClusterError, match="a worker returned no result of x"):
            remote.check(run, trained._replace(record=bad), named, sizes)


@pytest.fixture
def cluster_of(ray, monkeypatch, returned, invented):
    """Makes the stand-in for Ray a cluster that trains in this process.

    `outcome` is called with the label of each task ("x 0", or "x 0 1" for a cohort) and the number of its tries. It may
    raise. `look` returns the resources of the cluster.
    """
    monkeypatch.setattr(remote, "_mapped", lambda *stored: invented)
    monkeypatch.setattr(remote.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(cluster, "silent", lambda address, timeout: None)
    monkeypatch.setattr(cluster, "QUIET", 0.1)
    monkeypatch.setattr(cluster, "LOST", 0.3)
    monkeypatch.setattr(cluster, "LOOK", 0.02)

    def make(outcome, look=lambda: {"CPU": 2}):
        tried = {}

        def submit(software, group, *arguments):
            label = " ".join(["x", *(str(spec["seed"]) for _, spec in group)])
            tried[label] = tried.get(label, 0) + 1
            return label, tried[label], (software, group, *arguments)

        def get(ref):
            label, attempt, arguments = ref
            outcome(label, attempt)
            return remote.by_value()(*arguments)

        class Ref(tuple):
            __hash__ = object.__hash__

        ray.remote = lambda **options: lambda task: types.SimpleNamespace(remote=lambda *a: Ref(submit(*a)))
        ray.put = lambda data: data
        ray.get = get
        ray.wait = lambda refs, timeout: (refs[:1], refs[1:])
        ray.cluster_resources = look
        ray.get_runtime_context = lambda: types.SimpleNamespace(gcs_address="10.0.0.1:6379")
        return tried

    return make


def seeds(small_spec, count, out):
    return [[Run("x", small_spec(epochs=1, seed=seed), out)] for seed in range(count)]


def test_a_run_that_diverges_or_kills_its_workers_has_failed_and_the_others_go_on(
    cluster_of, small_spec, invented, tmp_path
):
    def outcome(label, attempt):
        if label == "x 0":
            raise ERRORS.WorkerCrashedError if attempt % 2 else ERRORS.OutOfMemoryError

    tried = cluster_of(outcome)
    groups = seeds(small_spec, 3, tmp_path)
    groups[1] = [Run("x", {**groups[1][0].spec, "lr": 1e30, "optimizer": "sgd", "norm": "none"}, tmp_path)]
    events = []
    trained = remote.train(groups, invented, compiled=False, listener=lambda run, event: events.append(event))
    ended = {record.seed: record for record in trained}
    assert OnCluster(3) in events
    assert OnCluster(1) in events
    assert tried == {"x 0": remote.DEATHS, "x 1": 1, "x 2": 1}
    assert {seed: type(record) for seed, record in ended.items()} == {0: Failed, 1: Failed, 2: Finished}
    assert ended[0].error.startswith("the worker died 3 times while it trained this run")
    assert {record.seed: record for record in read_records(tmp_path)} == ended
    assert not list(tmp_path.glob("checkpoints/x/*.lock.owner"))


def test_a_run_of_another_data_set_that_kills_its_workers_has_failed(cluster_of, small_spec, tmp_path):
    """Its record has the classes, as every file of such a run has."""

    def outcome(label, attempt):
        raise ERRORS.WorkerCrashedError

    cluster_of(outcome)
    run = Run("x", small_spec(epochs=1, dataset="synthetic"), tmp_path)
    [record] = remote.train([[run]], datasets.load("synthetic", tmp_path), compiled=False)
    assert isinstance(record, Failed)
    assert record.info == datasets.get("synthetic").info
    assert read_record(run.record) == record


def test_a_node_that_is_lost_does_not_count(cluster_of, small_spec, invented, tmp_path):
    def outcome(label, attempt):
        if attempt < 5:
            raise ERRORS.NodeDiedError if attempt % 2 else ERRORS.ObjectLostError

    tried = cluster_of(outcome)
    [record] = remote.train(seeds(small_spec, 1, tmp_path), invented, compiled=False)
    assert isinstance(record, Finished)
    assert tried == {"x 0": 5}
    assert list(remote.train(seeds(small_spec, 1, tmp_path), invented, compiled=False)) == [record]
    assert tried == {"x 0": 5}, "what is finished was trained again"


@pytest.mark.parametrize("error", [TooLarge("too large"), None], ids=["memory", "worker"])
def test_a_cohort_that_cannot_be_trained_together_is_trained_one_by_one(
    cluster_of, small_spec, invented, tmp_path, error
):
    """The lost worker counts for none of its runs."""

    def outcome(label, attempt):
        if label == "x 0 1":
            raise ERRORS.RayTaskError(error) if error else ERRORS.WorkerCrashedError
        if not error and attempt < remote.DEATHS:
            raise ERRORS.WorkerCrashedError

    tried = cluster_of(outcome)
    together = [run for group in seeds(small_spec, 2, tmp_path) for run in group]
    ended = list(remote.train([together], invented, compiled=False))
    assert [type(record) for record in ended] == [Finished, Finished]
    assert tried["x 0 1"] == 1


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ERRORS.RayError("the disk is full\nof logs"), "the Ray cluster has failed: the disk is full of logs"),
        (ERRORS.RayTaskError(StoreError("cannot write /tmp/x")), "cannot write /tmp/x"),
    ],
)
def test_any_other_failure_ends_the_sweep_with_a_sentence(cluster_of, small_spec, invented, tmp_path, raised, said):
    def outcome(label, attempt):
        raise raised

    cluster_of(outcome)
    with pytest.raises(UserError, match=f"^{said}$"):
        list(remote.train(seeds(small_spec, 2, tmp_path), invented, compiled=False))
    assert not list(tmp_path.glob("checkpoints/x/*.json"))


def test_a_record_under_another_id_is_not_written(cluster_of, small_spec, invented, tmp_path, monkeypatch):
    cluster_of(lambda label, attempt: None)
    work = remote.work

    def other(group, *rest, **options):
        [(name, spec)] = group
        return work([(name, {**spec, "lr": 0.5})], *rest, **options)

    monkeypatch.setattr(remote, "work", other)
    with pytest.raises(cluster.ClusterError, match="a worker returned x seed 0 with id "):
        list(remote.train(seeds(small_spec, 1, tmp_path), invented, compiled=False))
    assert not list(tmp_path.glob("checkpoints/x/*.json"))
    assert not list(tmp_path.glob("checkpoints/x/*.safetensors"))


def test_a_cluster_without_a_node_is_reported_once_and_waited_for(cluster_of, small_spec, invented, tmp_path):
    start = time.monotonic()
    notices = []

    def outcome(label, attempt):
        if len(notices) < 1 or time.monotonic() < start + 0.5:
            time.sleep(0.01)
            raise ERRORS.NodeDiedError

    cluster_of(outcome, look=lambda: {} if time.monotonic() < start + 0.5 else {"CPU": 1.0})
    records = list(remote.train(seeds(small_spec, 1, tmp_path), invented, compiled=False, on_notice=notices.append))
    assert [type(record) for record in records] == [Finished]
    assert notices == ["the cluster has no CPU; the runs wait for it"]


def test_a_lost_head_is_reported_and_then_given_up(cluster_of, small_spec, invented, tmp_path, monkeypatch):
    """While it does not answer, no call is made that would not return."""
    silent = []
    monkeypatch.setattr(cluster, "silent", lambda address, timeout: "Connection refused" if silent else None)

    def outcome(label, attempt):
        assert not silent
        silent.append(label)
        raise ERRORS.NodeDiedError

    def look():
        assert not silent
        return {"CPU": 1}

    cluster_of(outcome, look)
    monkeypatch.setattr(cluster, "LOOK", 0.0)
    notices, start = [], time.monotonic()
    with pytest.raises(cluster.ClusterError, match=r"^the head of the Ray cluster, 10\.0\.0\.1:6379, is gone "):
        list(remote.train(seeds(small_spec, 2, tmp_path), invented, compiled=False, on_notice=notices.append))
    assert time.monotonic() - start < 5
    assert notices == [
        "the head of the cluster, 10.0.0.1:6379, does not answer (Connection refused); the runs wait for it"
    ]


def test_the_result_of_a_worker_is_written_completely_or_not_at_all(tmp_path):
    record = make("x")
    run = Run("x", record.spec, tmp_path)
    run.folder.mkdir(parents=True)  # as the lock of the run does
    assert remote.keep(run, record, b"weights") == record
    assert read_record(run.record) == record
    assert run.weights.read_bytes() == b"weights"
    (again := run.weights).unlink()
    again.mkdir()  # it cannot be written
    with pytest.raises(StoreError, match="cannot write"):
        remote.keep(run, record, b"others")
    assert read_record(run.record) == record, "a result was lost before there was another"
    again.rmdir()
    assert remote.keep(run, record, b"others") == record
    assert again.read_bytes() == b"others"
    failed = Failed(
        **{key: getattr(record, key) for key in ("name", "spec", "spec_id", "seed", "data", "environment")}, error="no"
    )
    remote.keep(run, failed, b"")
    assert read_record(run.record) == record, "a failure has replaced a result"
