"""What the pages say of the code: their examples as they stand there, the map of the files, the count of lines."""

import importlib.util
import re
import subprocess
import sys

import pytest

import core
from core.data import cifar10
from core.runs.record import Failed
from tests.conftest import ROOT, lacking


def source_of(page, begins):
    """The Python of a page that begins with these words."""
    [found] = re.findall(
        rf"^```python\n({re.escape(begins)}.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S
    )
    return found


def test_the_sweep_of_a_notebook(invented, tmp_path, monkeypatch, capsys):
    """On few images, for one epoch and eager, but with the same lines; and one of the runs diverges."""
    source = source_of("docs/python.md", "from pathlib")
    assert len([line for line in source.splitlines() if line]) <= 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "load", lambda folder: invented)
    real = core.run_experiment

    def run_experiment(name, spec, out, data):
        diverges = (spec["lr"], spec["seed"]) == (1e-3, 1)
        changes = {"epochs": 1, "lr": 1e38} if diverges else {"epochs": 1}
        return real(name, {**spec, **changes}, out, data, compiled=False)

    monkeypatch.setattr(core, "run_experiment", run_experiment)
    names = {}
    exec(source, names)
    best = names["best"]
    assert [record.seed for record in names["records"]] == [0, 0, 1, 1, 2, 2]
    assert [isinstance(record, Failed) for record in names["records"]] == [False, False, True, False, False, False]
    assert len(list(tmp_path.glob("trials/checkpoints/small-lr=*/*.json"))) == 6
    assert capsys.readouterr().out == f"{best.name} {best.seed} {best.metrics.test.accuracy}\n"


@pytest.mark.parametrize(
    ("page", "begins", "packages"),
    [
        ("README.md", "from core import predict, run_experiment", []),
        ("docs/listeners.md", "from core import run_experiment", []),
        ("docs/json.md", "import pandas", ["pandas"]),
    ],
)
def test_the_python_of_a_page(page, begins, packages, invented, tmp_path, monkeypatch):
    """On few images, for one epoch, with a small network and eager, but with the same lines."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        lacking(f"{', '.join(missing)} not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar10, "load", lambda folder: invented)
    small = {"widths": [16], "epochs": 1}
    real = core.run_experiment
    monkeypatch.setattr(
        core,
        "run_experiment",
        lambda name, spec, *more, **options: real(name, {**spec, **small}, *more, compiled=False, **options),
    )
    real("small", small, ".", invented, compiled=False)
    names = {}
    exec(source_of(page, begins), names)
    if page == "README.md":
        assert names["probabilities"].shape == (8, 10)
        assert names["record"].name == "small"
    if page == "docs/listeners.md":
        assert (tmp_path / "epochs.csv").read_text().startswith("small,0,1,")


def test_the_first_line_of_a_notebook_in_a_folder_of_its_own(tmp_path):
    """With it, the core and the data are found from there."""
    line = re.search(r"its first line is\s+`([^`]+)`", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"))[1]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "core").symlink_to(ROOT / "core")
    program = f"{line}\nimport core.spec, pathlib\nprint(pathlib.Path('data').absolute())"
    done = subprocess.run(
        (sys.executable, "-P", "-c", program), cwd=tmp_path / "notebooks", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path.resolve() / "data")


def test_the_map_names_every_file_of_core():
    """In the block of docs/design.md: a file as core/x.py, or below the line of its folder, such as core/data/."""
    block = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## The files\n")[1].split("```")[1]
    found, folder = [], ""
    for line in block.splitlines():
        places = re.match(r" *([\w./]+(?:, [\w./]+)*)", line)
        names = places[1].split(", ") if places else []
        folder = folder if line.startswith(" ") else names[0] if names else ""
        found += [folder + name for name in names] if line.startswith(" ") else names
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "core").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(name for name in found if name.startswith("core/") and name.endswith(".py")) == sorted(files)
    assert all((ROOT / name).exists() for name in re.findall(r"[\w./]+/[\w./]*", block))


def test_the_commands_work_in_every_shell():
    """PowerShell 5 has no `&&`, gives programs `*` as it is, and splits a word at a comma. SLURM is on Linux alone."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"):
        text = page.read_text(encoding="utf-8").replace("\\\n", "")
        commands = [line for block in re.findall(r"^```sh\n(.*?)```", text, re.M | re.S) for line in block.splitlines()]
        commands += re.findall(r"`((?:uv|git|--seeds) [^`|]+)`", text)
        for command in commands:
            if not command.startswith("srun "):
                unquoted = re.sub(r'"[^"]*"|#.*', "", command)
                assert not re.search(r"&&|[*,;$']|\\$", unquoted), (page.name, command)


def test_the_core_has_about_as_many_lines_as_the_readme_says():
    said = re.search(r"numbers\s+take about ([\d,]+) lines", (ROOT / "README.md").read_text(encoding="utf-8"))
    files = [*(ROOT / "core" / "functional").glob("*.py"), ROOT / "core" / "data" / "loader.py"]
    assert abs(sum(len(path.read_text().splitlines()) for path in files) - int(said[1].replace(",", ""))) <= 50
