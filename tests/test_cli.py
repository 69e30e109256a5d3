"""The command line end to end, each command in a process of its own, and its answers to bad input."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from core import cli, predict, terminal
from core.code_hash import CODE
from core.data import cifar10 as dataset
from core.errors import UserError
from core.functional import model
from core.mode import Mode
from core.plan import Project
from core.runs import checkpoint, files
from core.runs.provenance import environment
from core.runs.record import Metrics, Weights
from core.spec import CIFAR10, resolve, spec_id
from experiments import SUITES
from tests.conftest import EXPERIMENTS, ROOT
from tests.test_store import STRANGE

SMOKE = spec_id(resolve(EXPERIMENTS["smoke"]))
SEED_1 = spec_id(resolve({**EXPERIMENTS["smoke"], "seed": 1}))


def assert_refused(done, *words):
    """One sentence on stderr, exit status 2, nothing on stdout."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert str(word) in line


def contents(out):
    """Every file of an --out that a run may not lose, with its bytes; without .diff.gz, which only uncommitted code
    leaves."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix not in (".lock", ".gz")
    }


@pytest.fixture(scope="module")
def official(call, tmp_path_factory):
    """The answer of a first run of smoke, and its --out, which no test may change."""
    out = tmp_path_factory.mktemp("official")
    done = call("run", "smoke", "--no-compile", "--device", "cpu", "--out", out, pictures=True)
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.fixture
def out(official, tmp_path):
    """A copy of the first run's --out."""
    return shutil.copytree(official[1], tmp_path / "out")


def weights(out):
    return out / "checkpoints" / "smoke" / f"{SMOKE}.safetensors"


def record(out):
    return json.loads(weights(out).with_suffix(".json").read_text())


# What a run does


@pytest.mark.slow
def test_a_run_leaves_weights_record_and_report(official):
    done, out = official
    pictures = ["best-confusion.svg", "best-first-layer.png", "best-mistakes.png", "learning-curves.svg"]
    tables = ["learning-curves.csv", "metrics.json", "results.csv"]
    names = [*pictures, *tables, f"smoke/{SMOKE}.json", f"smoke/{SMOKE}.safetensors"]
    assert contents(out).keys() == {"results.md", *(f"checkpoints/{name}" for name in names)}
    found = record(out)
    assert found["status"] == "finished"
    assert found["spec"] == resolve(EXPERIMENTS["smoke"])
    assert (found["name"], found["spec_id"], found["seed"]) == ("smoke", SMOKE, 0)
    assert found["history"]["epoch"] == [1, 2]
    history = {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds", "samples_per_second"}
    assert found["history"].keys() == history | {"epoch"}
    assert found["history"]["train_loss"][1] < found["history"]["train_loss"][0]
    assert {split: metrics["n"] for split, metrics in found["metrics"].items()} == {
        "train": 45_000,
        "validation": 5_000,
        "test": 10_000,
    }
    assert found["metrics"]["test"]["accuracy"] > 0.3  # chance is 0.1
    assert found["metrics"]["validation"]["accuracy"] == found["history"]["val_accuracy"][1]
    assert found["first_step_seconds"] > 0
    assert found["data"] == dataset.DIRECTORY_HASH
    assert found["environment"]["mode"] == "eager"
    assert found["environment"].keys() >= {"git", "torch", "device", "device_name", "hardware", "threads"}
    accuracy = f"{100 * found['metrics']['test']['accuracy']:.2f}%"
    assert accuracy in (out / "results.md").read_text()
    assert accuracy in done.stdout
    assert "smoke seed 0: epoch 2:" in done.stdout
    assert "no C++ compiler" not in done.stderr


@pytest.mark.slow
def test_a_second_call_trains_nothing(call, out):
    before = contents(out)
    done = call("run", "smoke", "--no-compile", "--data", "/nowhere", "--out", out)
    assert done.returncode == 0
    assert f"smoke ({SMOKE}) is finished: {100 * record(out)['metrics']['test']['accuracy']:.2f}%" in done.stdout
    assert "epoch 1" not in done.stdout
    assert contents(out) == before


@pytest.mark.slow
def test_a_run_under_a_former_name_is_found_by_either_name(call, out):
    tensors, about = checkpoint.load(weights(out), Weights, predict.template)
    old = out / "checkpoints" / "fume"
    (out / "checkpoints" / "smoke").rename(old)
    about.name = "fume"
    checkpoint.save(old / weights(out).name, tensors, about)
    path = old / f"{SMOKE}.json"
    path.write_text(path.read_text().replace('"name": "smoke"', '"name": "fume"'))
    before = contents(old)
    for name, said in (("smoke", ""), ("fume", "fume has a new name: smoke\n")):
        options = {"patch": "import main; main.PROJECT = main.PROJECT._replace(former={'fume': 'smoke'})", "out": out}
        done = call("run", name, "--no-compile", **options)
        assert (done.returncode, done.stderr) == (0, said)
        assert f"smoke ({SMOKE}) is finished" in done.stdout
        done = call("evaluate", name, "--json", **options)
        assert (done.returncode, done.stderr) == (0, said)
        assert json.loads(done.stdout)["experiment"] == "smoke"
    assert contents(old) == before
    assert not weights(out).parent.exists()
    assert "| smoke |" in (out / "results.md").read_text()
    assert "fume" not in (out / "results.md").read_text()


@pytest.mark.slow
def test_a_run_of_other_code_is_named_and_neither_counted_nor_replaced(call, out):
    path = weights(out).with_suffix(".json")
    path.write_text(path.read_text().replace(CODE, "0" * 12))
    before = path.read_bytes()
    done = call("run", "smoke", "--no-compile", "--data", "/nowhere", "--out", out)
    assert done.returncode == 2
    assert done.stderr == (
        "1 finished run is of other code, which gives other numbers (smoke seed 0): neither counted as results of this "
        "code nor replaced; --force trains them anew\n"
    )
    assert done.stdout == ""
    assert path.read_bytes() == before
    dry = call("run", "smoke", "--dry-run", "--no-compile", "--out", out)
    assert dry.stderr == done.stderr
    assert dry.stdout.startswith("1 runs, 0 to train")


@pytest.mark.slow
def test_force_trains_again_and_without_a_compiler_eager(call, out, tmp_path):
    """Two things in one run: --force, and a machine that has no C++ compiler and was not told --no-compile."""
    env = {"PATH": str(tmp_path / "empty"), "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = call("smoke", "--force", "--device", "cpu", "--out", out, env=env, all_images=False)
    assert done.returncode == 0
    (line,) = done.stderr.strip().splitlines()
    assert (
        line == "smoke seed 0: no C++ compiler (g++ or clang++) was found: the train step runs eager, which is slower"
    )
    assert "smoke seed 0: epoch 2:" in done.stdout
    assert "is finished" not in done.stdout
    assert record(out)["environment"]["mode"] == "eager"
    assert record(out)["status"] == "finished"


@pytest.mark.slow
def test_overrides_make_another_run_and_leave_the_official_one_alone(call, out):
    before = contents(out)
    options = ("--epochs", 1, "--seed", 3, "--lr", 0.01, "--batch-size", 1000)
    done = call("run", "smoke", *options, "--no-compile", "--out", out, all_images=False)
    assert done.returncode == 0, done.stderr
    changed = {"epochs": 1, "seed": 3, "lr": 0.01, "batch_size": 1000}
    other = spec_id(resolve({**EXPERIMENTS["smoke"], **changed}))
    assert other != SMOKE
    found = json.loads((out / "checkpoints" / "smoke" / f"{other}.json").read_text())
    assert {key: found["spec"][key] for key in changed} == changed
    after = contents(out)
    assert all(after[name] == before[name] for name in before if SMOKE in name)
    assert after.keys() - before.keys() == {f"checkpoints/smoke/{other}.{kind}" for kind in ("json", "safetensors")}
    table = [line for line in (out / "results.md").read_text().splitlines() if line.startswith("| smoke ")]
    assert len(table) == 2


@pytest.mark.slow
def test_report_writes_the_same_bytes_as_the_run(call, out):
    before = contents(out)
    for name in ("results.md", *(f"checkpoints/{n}" for n in ("learning-curves.svg", "results.csv", "metrics.json"))):
        (out / name).unlink()
    done = call("report", "--out", out, pictures=True)
    assert done.returncode == 0
    assert "1 records" in done.stdout
    assert contents(out) == before
    done = call("report", "--group-by", "lr", "--out", out)
    assert done.returncode == 0
    assert "\n## By lr\n" in (out / "results.md").read_text()


def test_a_report_by_an_unknown_key_is_refused(call, out):
    before = contents(out)
    done = call("report", "--group-by", "learning_rate", "--out", out)
    assert_refused(done, "cannot group by 'learning_rate'", "did you mean 'lr'?")
    assert contents(out) == before


def test_a_report_of_a_folder_without_runs_is_refused(call, tmp_path):
    assert_refused(call("report", "--out", tmp_path / "typo"), "there are no runs under", tmp_path / "typo")
    assert_refused(call("report", "--out", tmp_path), "there are no runs under")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["run", "smoke", "--no-compile"], ["report"]], ids=lambda value: value[0])
def test_a_file_of_another_program_is_not_replaced(call, tmp_path, command):
    """The error comes before the training."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "results.md").write_text("# Results of my thesis\n")
    done = call(*command, "--out", tmp_path)
    assert_refused(done, tmp_path / "results.md", "was not written by this program", "--out")
    assert {path.name for path in tmp_path.rglob("*")} == {"checkpoints", "results.md"}
    assert (tmp_path / "results.md").read_text() == "# Results of my thesis\n"


def test_list_is_a_table_that_fits_80_columns(call):
    """It has every suite and experiment; a name of 100 letters takes several lines."""
    long = "long-" * 20
    suite = f"import experiments; experiments.SUITES['wide'] = {{'{long}': {{'lr': 3e-4}}}}"
    done = call("list", patch=f"from core import terminal; terminal.console.width = 80; {suite}")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(re.search(rf"^{suite} ", done.stdout, re.M) for suite in SUITES)
    for name, spec in EXPERIMENTS.items():
        assert re.search(rf"^  {re.escape(name)}  .*\n  {spec_id(resolve(spec))}  ", done.stdout, re.M)
    first_column = "".join(line[: lines[0].index("time, disk")].strip() for line in lines)
    assert long + spec_id(resolve({"lr": 3e-4})) in first_column


# Sweeps


SWEEP = """
import experiments
spec = {"widths": [[64, 32], [32]], "lr": [1e-3, 5e-4], "epochs": 1, "batch_size": 200}
experiments.SUITES["tiny"] = {"tiny": spec}
"""


def test_a_grid_with_seeds_and_the_plan_of_it(start, data_dir, tmp_path):
    command = ("run", "tiny", "--seeds", 2, "--no-compile", "--device", "cpu", "--data", data_dir)

    def answer(*options):
        process = start(*command, *options, out=tmp_path, patch=SWEEP)
        assert process.wait() == 0, process.output()
        assert process.stderr.read_text() == ""
        return process.stdout.read_text().splitlines()

    names = [f"tiny-widths={widths}-lr={lr}" for widths in ("64x32", "32") for lr in ("0.001", "0.0005")]
    labels = [f"{name} seed {seed}" for seed in range(2) for name in names]
    *plan, total = answer("--dry-run")
    assert [line.split("  ")[0] for line in plan] == labels
    assert all(line.endswith("B") and "time not measured here yet" in line for line in plan)
    assert re.fullmatch(r"8 runs, 8 to train: time not measured here yet, .* MB, and .* MB while one is trained", total)
    assert not list(tmp_path.iterdir()), "a dry run has written something"

    announced, first_step, *lines = answer()
    runs, (heading, *table) = lines[:8], lines[8:]
    assert announced.startswith(f"{labels[0]}: starts")
    assert first_step.startswith(f"{labels[0]}: first step")
    assert [line.split(":")[0] for line in runs] == labels
    for n, line in enumerate(runs, 1):
        left = r", about \d+ s left" if n < 8 else ""
        best = r"best so far tiny-\S+, (mean )?validation (of 2 seeds )?\d\d\.\d\d%"
        said = rf".*: validation \d\d\.\d\d%, test \d\d\.\d\d% in \d s \({n} of 8 done{left}; {best}\)"
        assert re.fullmatch(said, line)
    assert heading.split() == ["experiment", "seeds", "train", "validation", "test"]
    assert [row.split()[:2] for row in table] == [[name, "2"] for name in names]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == set(names)
    assert len(list(tmp_path.glob("checkpoints/*/*.json"))) == 8

    assert answer()[0] == "8 of 8 runs are finished already; --force trains them again"
    assert [line.split("  ")[2] for line in answer("--dry-run")[:-1]] == ["finished"] * 8
    more = answer("--dry-run", "--seeds", "7,1")
    assert re.search(r"  (about \d+ s|under a second), ", more[0])
    assert more[4].endswith("  finished")
    assert re.match("8 runs, 4 to train: (about|under) ", more[-1])


def test_the_version_is_that_of_the_changelog(capsys):
    project = Project(ROOT, SUITES, {}, "learning-rate")
    with pytest.raises(SystemExit, match="0"):
        cli.parse(["--version"], project)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert capsys.readouterr().out.strip() == newest


def test_verbose_shows_the_epochs_of_a_sweep(start, data_dir, tmp_path):
    command = ("smoke", "--seeds", "3,7", "--epochs", 1, "--no-compile", "--data", data_dir)
    for options, epochs in (((), 0), (("-v", "--force"), 2)):
        process = start("run", *command, *options, out=tmp_path)
        assert process.wait() == 0, process.output()
        assert process.output().count(": epoch 1:") == epochs
        assert process.output().count("first step") == max(1, epochs)
    process = start("verify", *command, out=tmp_path)
    assert process.wait() == 0, process.output()
    for seed in (3, 7):
        assert f"smoke seed {seed}: the same bits" in process.output()


@pytest.mark.parametrize(
    ("suite", "words"),
    [
        ("{'wide': {'lr': [0.1] * 101, 'dropout': [0.1] * 100}}", "its grid has 10,100 members, expected at most"),
        ("{'wide': {'lr': [0.1, 0.1]}}", "two members of its grid are named wide-lr=0.1"),
        ("{'baseline': {'lr': 0.1}}", "the name baseline stands for two different things"),
        ("{'wide': {'lrr': [0.1, 0.2]}}", "experiment wide-lrr=0.1: unknown key 'lrr'; did you mean 'lr'?"),
        ("{'a b': {}}", "'a b' cannot name an experiment"),
    ],
)
def test_invalid_grids_are_refused(call, tmp_path, suite, words):
    patch = f"import experiments\nexperiments.SUITES['s'] = {suite}"
    for command in (["run", "s", "--dry-run", "--out", tmp_path], ["list"]):
        assert_refused(call(*command, patch=patch), words)


def test_list_estimates_from_what_was_measured_here(call, official):
    listed = call("list", "--out", official[1]).stdout
    row = rf'^  smoke  +(about \d+ s|under a second)  +"widths=64,32" .*\n  {SMOKE}  +\d+\.\d kB  '
    assert len(re.findall(row, listed, re.M)) == 1


# Evaluation


@pytest.mark.slow
def test_evaluate_agrees_with_the_record(call, official):
    out = official[1]
    done = call("evaluate", "--out", out)
    assert done.returncode == 0, done.stdout
    test = record(out)["metrics"]["test"]
    assert f"{100 * test['accuracy']:.2f}% of 10,000 test images" in done.stdout
    assert f"loss {test['loss']:.4f}; as recorded" in done.stdout
    assert "95% interval" in done.stdout
    for label, hit in zip(CIFAR10.classes, test["correct"], strict=True):
        assert f"{label} {100 * hit / 1000:.1f}%" in done.stdout


@pytest.fixture
def wrong_checkpoint(tmp_path, small_spec):
    """An undamaged checkpoint with a valid signature, and with metrics that its network does not reach."""
    spec = small_spec()
    params, stats = model.init(spec, 0)
    test = Metrics(accuracy=0.1, loss=2.3, n=10_000, correct=[100] * 10, count=[1000] * 10)
    about = {
        "name": "x",
        "seed": 0,
        "spec": spec,
        "spec_id": spec_id(spec),
        "data": "x",
        "digest": "0" * 64,
        "test": test,
    }
    about["environment"] = environment(torch.device("cpu"), Mode("eager"))
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {**params, **stats}, Weights(**about))
    return path


def test_a_checkpoint_with_wrong_metrics_is_detected(call, wrong_checkpoint):
    assert call("evaluate", wrong_checkpoint).returncode == 1


@pytest.mark.parametrize("key", ["test", "name", "digest"])
def test_a_checkpoint_that_lacks_metadata_is_refused(call, wrong_checkpoint, key, monkeypatch):
    tensors, about = checkpoint.load(wrong_checkpoint, Weights, predict.template)
    to_builtins = checkpoint.msgspec.to_builtins
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint.msgspec, "to_builtins", lambda a: {k: v for k, v in to_builtins(a).items() if k != key}
        )
        checkpoint.save(wrong_checkpoint, tensors, about)
    assert_refused(call("evaluate", wrong_checkpoint), wrong_checkpoint, f"missing required field `{key}`")


@pytest.mark.slow
def test_evaluate_as_json_and_a_record_that_differs(call, out):
    """Two checkpoints: one as it was written, one that claims another accuracy, which is exit status 1."""
    tensors, about = checkpoint.load(weights(out), Weights, predict.template)
    boast, test = out / "boast.safetensors", about.test
    correct = [test.correct[0] + 1, *test.correct[1:]]
    about.test = Metrics(test.accuracy + 1e-4, test.loss, test.n, correct, test.count)
    checkpoint.save(boast, tensors, about)
    done = call("evaluate", "smoke", boast, "--json", "--tta", "flip", out=out)
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]  # nothing else is on stdout
    lines, mirrored = lines[::2], lines[1::2]  # the plain number comes first
    assert [line["tta"] for line in mirrored] == ["flip", "flip"]
    assert [line["recorded_test_accuracy"] for line in mirrored] == [record(out)["flipped"]["test"]["accuracy"], None]
    expected = {
        "checkpoint": str(weights(out)),
        "experiment": "smoke",
        "seed": 0,
        "test_accuracy": test.accuracy,
        "test_loss": pytest.approx(test.loss, rel=1e-6),
        "n": 10_000,
        "tta": "none",
        "recorded_test_accuracy": test.accuracy,
    }
    assert lines == [
        expected,
        {**expected, "checkpoint": str(boast), "recorded_test_accuracy": about.test.accuracy},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["accuracy", "digest"])
def test_evaluate_compares_with_the_record_beside(call, out, key):
    """Not with the metadata of the weights: results.md is made from the records."""
    path = weights(out).with_suffix(".json")
    found = record(out)
    if key == "digest":
        found["digest"] = "0" * 64
    else:
        found["metrics"]["test"]["accuracy"] += 1e-4
        found["metrics"]["test"]["correct"][3] += 1
        del found["answers"]  # which would contradict it
    path.write_text(json.dumps(found))
    done = call("evaluate", out=out)
    assert done.returncode == 1, done.stderr
    assert f"the run recorded {100 * found['metrics']['test']['accuracy']:.2f}%" in done.stdout
    path.unlink()
    assert call("evaluate", out=out).returncode == 0


# Terminals


def test_any_name_is_shown_in_one_line(capsys):
    """A file may be called "a\\nb". Only a program makes paragraphs: a UserError with several lines."""
    odd = "a\nb\r\x1b[31m\u2028"
    terminal.say(odd)
    terminal.warn(odd)
    terminal.fail(UserError(f"cannot read {odd}", "  because"))
    terminal.fail(OSError(2, "No such file", odd))
    shown = capsys.readouterr()
    escaped = r"a\nb\r\x1b[31m\u2028"
    assert shown.out == f"{escaped}\n"
    lines = shown.err.splitlines()
    assert lines[:3] == [escaped, f"error: cannot read {escaped}", "  because"]
    assert len(lines) == 4
    assert lines[3].startswith("error: [Errno 2] No such file: ")


NOBODY_READS = """
import os
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer, 1)
"""


def test_a_closed_pipe_is_no_error(call, out):
    """Neither in the middle of the output nor at its end."""
    assert run_main("list", "--keys", shell="| true").stderr == ""
    done = call("evaluate", "--json", "--out", out, patch=NOBODY_READS)
    assert (done.returncode, done.stderr) == (1, "")


def test_names_that_look_like_markup(call, out, tmp_path):
    odd = (tmp_path / "[red]x[/blue]").absolute()
    shutil.copytree(out, odd)
    done = call("report", "--out", odd)
    assert done.returncode == 0, done.stderr
    assert str(odd) in done.stdout


@pytest.mark.parametrize("command", [["evaluate", "--out"], ["run", "smoke", "--no-compile", "--data"]], ids=str)
def test_a_name_that_is_too_long_is_refused(call, tmp_path, command):
    arguments = [*command, tmp_path / ("x" * 300)]
    if command[0] == "run":
        arguments += ["--out", tmp_path / "out"]
    assert_refused(call(*arguments), "File name too long")


@pytest.mark.parametrize("kind", ["damaged", "later"])
def test_an_unreadable_record_is_reported_in_one_line_and_stops_nothing_else(call, out, data_dir, kind):
    """A damaged record, or one of a later version. The call names another experiment, too."""
    finished, path = record(out), weights(out).with_name(f"{SEED_1}.json")
    later = {**finished, "schema_version": 2, "seed": 1, "spec_id": SEED_1, "spec": {**finished["spec"], "seed": 1}}
    path.write_text("{" if kind == "damaged" else json.dumps(later))
    before = path.read_bytes()
    for command in (("report",), ("list",), ("evaluate",)):
        done = call(*command, out=out)
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == (1 if command[0] in ("report", "list") else 0), "it says so once"
        assert all(str(path) in line and line.endswith("it is skipped and stays as it is") for line in lines)
    done = call("run", "smoke", "--seeds", 2, "--no-compile", "--force", "--epochs", 2, out=out, all_images=False)
    assert done.returncode == 2
    refused, _ = done.stderr.splitlines()
    assert refused.endswith(f"move that file to {path}.old")
    assert "smoke seed 0: validation" in done.stdout
    assert path.read_bytes() == before
    assert "(1 of 1 done" in done.stdout
    done = call("verify", "smoke", "--no-compile", out=out, all_images=False)
    assert (done.returncode, done.stderr) == (0, "")


def run_main(*arguments, shell="", **env):
    """A process of its own, started by a shell that may redirect its streams."""
    command = " ".join([sys.executable, str(ROOT / "main.py"), *map(str, arguments), shell])
    return subprocess.run(command, shell=True, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("option", ["-P", "-I"])
def test_a_python_whose_path_lacks_the_folder_of_the_script(tmp_path, option):
    """PYTHONSAFEPATH=1 is -P."""
    done = subprocess.run(
        (sys.executable, option, str(ROOT / "main.py"), "list", "--keys"), cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    """A shell leaves --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def parse(*argv):
        return cli.parse(list(argv), Project(ROOT, {}, {}, "suite"))

    home = tmp_path / "x"
    assert parse("--out=~/x").out == parse("--data=~/x").data == home
    assert parse("predict", "y", "~/x").images == [home]
    assert parse("export", "y", "--format", "torch", "--output=~/x").output == home
    assert files.find_file(tmp_path, "~/x") == home


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(streams):
    done = run_main("list", "--keys", shell=streams)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_path_that_the_terminal_cannot_encode_is_escaped(start, out, tmp_path, encoding):
    odd = tmp_path / "\u5b66\u7fd2\x1b[31m"
    shutil.copytree(out, odd)
    process = start("report", out=odd, patch=f"import sys; sys.stdout.reconfigure(encoding={encoding!r})")
    assert process.wait() == 0, process.stderr.read_text()
    printed = process.stdout.read_bytes()
    assert b"rebuilt from 1 records" in printed
    assert b"\x1b" not in printed
    assert ("\u5b66".encode() in printed) == (encoding == "utf-8")


def test_a_table_that_fits_a_narrow_terminal(call, out):
    narrow = "from core import terminal; terminal.console.width = 40"
    done = call("run", "smoke", "--no-compile", "--out", out, patch=narrow)
    assert done.returncode == 0, done.stderr
    heading = next(line for line in done.stdout.splitlines() if line.startswith("experiment"))
    assert heading.split() == ["experiment", "validation", "test"]
    assert f"{100 * record(out)['metrics']['test']['accuracy']:.2f}%" in done.stdout.splitlines()[-1]


def test_a_home_that_cannot_be_written_causes_no_warning(out, tmp_path):
    """Matplotlib wants to keep its cache there."""
    (tmp_path / "home").write_text("a file")
    home = str(tmp_path / "home")
    (out / "checkpoints" / "learning-curves.svg").unlink()
    done = run_main("report", "--out", out, HOME=home, XDG_CONFIG_HOME=home, XDG_CACHE_HOME=home, MPLCONFIGDIR=home)
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_second_experiment_says_how_long_its_own_start_took(start, data_dir, tmp_path):
    command = ("run", "smoke", "baseline", "--no-compile", "--epochs", 1, "--data", data_dir)
    process = start(*command, "-v", out=tmp_path)
    assert process.wait() == 0
    first, second = (line for line in process.output().splitlines() if "first step" in line)
    assert first.endswith("after the start of the process")
    assert second.endswith("after the start of this experiment")


# Bad input


@pytest.mark.parametrize("kind", ["pipe", "device", "200 GB", "nested", "escape"])
def test_a_hostile_record_is_named_at_once(call, out, kind):
    path = weights(out).with_suffix(".json")
    found = record(out)
    path.unlink()
    if kind == "nested":
        path.write_text('{"spec": ' + "[" * 100_000)
    elif kind == "escape":
        path.write_text(json.dumps({**found, "name": "\x1b[31mred"}))
    else:
        STRANGE[kind][0](path)
    assert_refused(call("evaluate", out=out), path, "is not a record that this version of the program can read")
    done = call("report", out=out)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{path} is not a record that this version of the program can read")
    assert done.returncode == 0
    assert "results.md rebuilt from 0 records" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "lr-1e3"], ["unknown experiment 'lr-1e3'; did you mean 'lr-1e-3'?"]),
        (["smok"], ["unknown experiment 'smok'; did you mean 'smoke'?"]),
        (["run", "smoke", "zzzzzzzzzz"], ["unknown experiment 'zzzzzzzzzz'; known are", "lr-1e-3", "baseline"]),
        (["run", "smoke", "--epochs", "0"], ["experiment smoke: epochs = 0, expected an integer from 1"]),
        (["--epochs", "-1"], ["epochs = -1"]),
        (["run", "smoke", "--batch-size", "45001"], ["batch_size = 45001, expected an integer from 2 to 45000"]),
        (["run", "smoke", "--lr", "0"], ["lr = 0.0, expected a finite number above 0"]),
        (["run", "smoke", "--lr", "nan"], ["lr = nan"]),
        (["run", "smoke", "--seed", "-1"], ["seed = -1"]),
        (
            ["run", "smoke", "--precision", "float16"],
            ["precision = 'float16', expected one of float32"],
        ),
        (["run", "smoke", "--seeds", "0"], ["--seeds 0, expected how many (5 is the seeds 0 to 4) or which (3,7,11"]),
        (["run", "smoke", "--seeds", "-2"], ["--seeds -2, expected how many"]),
        (["run", "smoke", "--seeds", "3,3"], ["--seeds 3,3, expected"]),
        (["--seeds", "5", "--seed", "3"], ["argument --seed: not allowed with argument --seeds"]),
        (["run", "smoke", "baseline", "--seeds", "5001"], ["10,002 runs, expected at most 10,000"]),
        (["run", "smoke", "--seeds", "4294967296"], ["4,294,967,296 runs, expected"]),
        (["run", "smoke", "--checkpoint-every", "0"], ["--checkpoint-every 0, expected at least 1"]),
        (["verify", "smoke", "--seeds", "2", "--precision", "bfloat16"], ["smoke has no finished run under"]),
        (["verify", "smoke"], ["smoke has no finished run under", "main.py run smoke"]),
        (["verify", "smoek"], ["did you mean 'smoke'?"]),
        (["evaluate"], ["no checkpoint under", "main.py"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_bad_arguments_are_refused(call, tmp_path, arguments, words):
    assert_refused(call(*arguments, "--out", tmp_path), *words)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "arguments", [["run", "--epochs", "many"], ["run", "--device", "tpu"], ["run", "--learning-rate", "1"]], ids=str
)
def test_unknown_arguments_are_refused(call, arguments):
    assert_refused(call(*arguments), arguments[1], "--help")


def test_a_device_that_is_not_available(call, tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    done = call("run", "smoke", "--device", "cuda", "--data", tmp_path, "--out", tmp_path, env=hidden)
    assert_refused(done, "device cuda is not available; available:", "cpu")
    assert contents(tmp_path) == {}


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS is there")
def test_a_device_of_another_platform(call, out):
    assert_refused(call("evaluate", "--device", "mps", "--out", out), "device mps is not available")


def test_no_data_and_no_network(call, tmp_path):
    done = call("run", "smoke", "--no-compile", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert done.returncode == 2
    first, *tried, again, archive, files = done.stderr.splitlines()
    folder = tmp_path / "data" / dataset.ARCHIVE.folder
    assert first == f"error: {folder} lacks the files of CIFAR-10, and nothing delivered them:"
    assert [line.split(": ")[0] for line in tried] == [f"  {mirror}" for mirror in dataset.ARCHIVE.addresses]
    assert "run the same command again" in again
    assert "--data-url" in archive
    assert "--data FOLDER" in files
    assert max(map(len, done.stderr.splitlines())) < 200


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_data_is_refused(call, data_dir, tmp_path, damage):
    folder = tmp_path / dataset.ARCHIVE.folder
    folder.mkdir()
    for name in dataset.ARCHIVE.files:
        (folder / name).symlink_to(data_dir / dataset.ARCHIVE.folder / name)
    path = folder / "batches.meta"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "truncated" else data[:-1] + b"!")
    done = call("run", "smoke", "--no-compile", "--data", tmp_path, "--out", tmp_path / "out")
    words = {
        "truncated": ("has 157 bytes, expected 158", "move it to "),
        "altered": ("is altered", "move it to "),
        "missing": ("lacks batches.meta", "--data-url"),
    }
    if damage == "missing":
        assert done.returncode == 2
        assert all(word in done.stderr for word in words[damage])
    else:
        assert_refused(done, folder, *words[damage])


def test_damaged_checkpoints_are_named(call, out):
    """Missing, truncated, altered, no checkpoint at all, a folder: each is named, and the others are evaluated."""
    good = weights(out).read_bytes()
    bad = {
        "truncated": good[:-1],
        "altered": good[:-5] + bytes([good[-5] ^ 1]) + good[-4:],
        "header": good[:30] + b"X" + good[31:],
        "empty": b"",
        "text": b"not a checkpoint at all, but long enough to be read as one",
    }
    for name, data in bad.items():
        path = out / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(checkpoint.CheckpointError, match=re.escape(str(path))):
            predict.load(path)
    done = call("evaluate", weights(out), out / "truncated.safetensors")  # the good one is evaluated all the same
    assert done.returncode == 2
    assert "as recorded" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "truncated.safetensors is damaged or not a checkpoint of this program: it is truncated" in line
    assert_refused(call("evaluate", out / "altered.safetensors"), "altered.safetensors is damaged")
    assert_refused(call("evaluate", out / "gone.safetensors"), "cannot read", "gone.safetensors: No such file")
    assert_refused(call("evaluate", out), out, "Is a directory")


@pytest.mark.parametrize("command", [["run", "smoke", "--no-compile"], ["report"]], ids=lambda value: value[0])
@pytest.mark.parametrize("where", ["out", "checkpoints"])
def test_an_out_that_cannot_be_written_is_refused_before_the_training(call, tmp_path, command, where):
    """A file is in the way, since root ignores permissions. The error comes before the training."""
    out = tmp_path / "out"
    if where == "checkpoints":
        out.mkdir()
    in_the_way = out if where == "out" else out / "checkpoints"
    in_the_way.write_text("mine")
    words = ("there are no runs under", out) if command == ["report"] else ("cannot write", in_the_way)
    assert_refused(call(*command, "--out", out), *words)
    assert in_the_way.read_text() == "mine"


def test_a_folder_named_results_md_is_refused(call, out):
    (out / "results.md").unlink()
    (out / "results.md").mkdir()
    before = contents(out)
    assert_refused(call("report", "--out", out, pictures=True), "cannot write", out / "results.md")
    assert contents(out) == before
