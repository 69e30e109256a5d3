"""The pages: what is generated in them is current, what they refer to exists, and their commands work.

uv run python tests/test_docs.py      writes what is generated
"""

import argparse
import math
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402
from core import cli, commands, compare  # noqa: E402
from core.commands import options  # noqa: E402
from core.compile import cache  # noqa: E402
from core.data import cifar10  # noqa: E402
from core.report import plots, published, questions, stats, text  # noqa: E402
from core.runs.record import read_records  # noqa: E402
from core.spec import FIELDS  # noqa: E402
from experiments import DEFAULT, FORMER_NAMES, SUITES  # noqa: E402
from tests.conftest import lacking  # noqa: E402
from tests.test_datasets import photos  # noqa: E402, F401 - a fixture

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


# What is generated


def with_table(page: str, headings: tuple[str, ...], rows: list[tuple]) -> str:
    """The page with another table in the place of the one that begins with the first of these headings."""
    table = text.grid(headings, rows)
    page, count = re.subn(rf"^\| {re.escape(headings[0])} \|.*\n(?:\|.*\n)+", lambda _: table, page, flags=re.M)
    assert count == 1, headings
    return page


def spec_keys(page: str) -> str:
    rows = [
        (f"`{key}`", stats.shown(field.default), str(field.values), field.meaning, "no" if field.dynamic else "yes")
        for key, field in FIELDS.items()
    ]
    return with_table(page, ("key", "default", "values", "meaning", "compiled in"), rows)


def parsers() -> dict[str, argparse.ArgumentParser]:
    subparsers = options.Parser(prog="main.py").add_subparsers()
    for command in commands.ALL:
        command.add_parser(subparsers, main.PROJECT)
    return dict(subparsers.choices)


def option(action: argparse.Action) -> tuple[str, str]:
    """The row of an option: how it is written, and its meaning."""
    value = action.metavar or ("|".join(action.choices) if action.choices else "")
    if action.nargs == "?":
        value = f"[{value}]"
    written = f"{', '.join(action.option_strings)} {value}".strip()
    meaning = (action.help or "").replace("%(default)s", str(action.default))
    assert meaning, action
    return f"`{written}`".replace("|", "\\|"), meaning.replace("|", "\\|")


def command_options(page: str) -> str:
    """The page has a section for each command, with a table of its options."""
    first, *sections = re.split(r"(?m)^(?=## )", page)
    of = parsers()
    assert [re.match("## (.*)\n", section)[1] for section in sections] == list(of)
    made = []
    for section, (name, parser) in zip(sections, of.items(), strict=True):
        actions = sorted(parser._actions, key=lambda action: bool(action.option_strings))  # first what has no dash
        rows = [option(action) for action in actions if action.dest != "help"]
        made.append(with_table(section, (f"`{name}` takes", "meaning"), rows))
    return "".join([first, *made])


def answers() -> dict[frozenset[str], str]:
    """The sentences that comparisons ended with, by the labels of their candidates."""
    return {
        frozenset(each.label for each in question.candidates): questions.sentence(question, look)
        for question, _, look in questions.asked(ROOT, list(read_records(ROOT)), FORMER_NAMES)
        if look.answer
    }


def readme(page: str) -> str:
    """The tables of results, what is said of them, and the lines of the step."""
    results = stats.results(read_records(ROOT), main.PROJECT.catalog().spec)
    rates = stats.ranked(group for group in results.compared if group.label in SUITES[DEFAULT])
    rows = [
        (
            group.label,
            f"{group[0].spec['lr']:g}",
            str(len(group)),
            stats.spread(stats.accuracies(group, "validation")),
            f"**{stats.spread(stats.accuracies(group, 'test'))}**",
            f"{stats.training(group):.0f} s",
            stats.timed(group)[0].environment.device_name,
        )
        for group in rates
    ]
    page = with_table(page, ("experiment", "learning rate", "seeds", "validation", "test", "training", "on"), rows)
    page = re.sub(r"run learning-rate --seeds \d+", f"run learning-rate --seeds {min(map(len, rates))}", page)
    best, *others = rates
    said = answers().get(frozenset(SUITES[DEFAULT]))
    if not said:
        pairs = math.comb(len(rates), 2)
        differences = [(other.label, stats.compare(best, other, "validation", pairs)) for other in others]
        if not any(found.significant for _, found in differences):
            chance = "but each difference may be chance"
        elif all(found.significant for _, found in differences):
            chance = "and the differences are more than chance"
        else:
            chance = "but not every difference is more than chance"
        said = f"Validation chooses **{best.label}**, {chance}: " + " and ".join(
            f"{found.mean:.2f} points over {label} (95% interval {found.mean - found.half:.2f} to "
            f"{found.mean + found.half:.2f}, {found.n} common seeds)"
            for label, found in differences
        )
        said += ". With a probability of 95%, all of these intervals contain their true differences"
        if all(found.n >= compare.first_look(stats.ALPHA / pairs) for _, found in differences):
            said += ", however many seeds are added"
    page = re.sub("(?m)(?<=^How sure is that\\? ).*$", f"{said}.", page)
    rows = [
        (
            published.recipe(group),
            str(len(group)),
            stats.spread(stats.accuracies(group, "test")),
            f"**{stats.spread(published.flipped(group))}**",
            f"{stats.training(group):,.0f} s",
            stats.timed(group)[0].environment.device_name,
            f"`uv run main.py run {group.label}{f' --seeds {len(group)}' if len(group) > 1 else ''}`",
        )
        for group in sorted(results.trained_on_all, key=lambda group: published.work(group[0]))
        if group.label in SUITES["best-by-time"]
    ]
    headings = ("recipe", "seeds", "test", "with mirror images", "training", "on", "command")
    page = with_table(page, headings, rows)
    code = (ROOT / "core" / "functional" / "step.py").read_text(encoding="utf-8")
    step = textwrap.dedent(re.search(r"( *def loss_function.*?= optimizer\.update\(.*?\n)", code, re.S)[1])
    return re.sub(r"(?s)```python\ndef loss_function.*?```", lambda _: f"```python\n{step}```", page)


GENERATED = {
    ROOT / "README.md": readme,
    ROOT / "docs" / "commands.md": command_options,
    ROOT / "docs" / "spec-keys.md": spec_keys,
}


@pytest.fixture
def committed():
    """The README shows the committed results. With runs of your own in checkpoints/, there are others."""
    command = ("git", "status", "--porcelain", "checkpoints", "results.md")
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        lacking("git is not there")
    if done.returncode or done.stdout:
        lacking("checkpoints/ and results.md are not as committed")


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_what_is_generated_is_current(path, request):
    if path.name == "README.md":
        request.getfixturevalue("committed")
    page = path.read_text(encoding="utf-8")
    assert page == GENERATED[path](page)


def test_the_step_in_the_readme_is_that_of_the_code():
    [shown] = re.findall(r"(?s)```python\n(def loss_function.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert 10 <= len(shown.splitlines()) <= 16
    code = (ROOT / "core" / "functional" / "step.py").read_text(encoding="utf-8")
    assert textwrap.indent(shown, 8 * " ") in code


def test_the_numbers_of_the_readme_are_those_of_results_md(committed):
    """The table of the learning rates, number by number."""
    page, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "results.md"))
    rows = re.findall(r"^\| (lr-\S+) \| \S+ \| (\d+) \| (\S+ ± \S+%) \| \*\*(\S+ ± \S+%)\*\*", page, re.M)
    assert {row[0] for row in rows} == SUITES[DEFAULT].keys()
    for name, *numbers in rows:
        lines = re.findall(rf"^\| {name} \|.*", results, re.M)
        assert any(all(f" {number}" in line.replace("*", "") for number in numbers) for line in lines), (name, numbers)


def test_the_readme_says_what_comparisons_ended_with(committed):
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = answers()
    said = re.findall(r"`uv run main.py compare ([^`]*)` ended with \*([^*]*)\*", page)
    assert len(said) == 2
    for words, answer in said:
        assert answer == found[frozenset(shlex.split(words))]
    said = re.search(r"`search search-default` .*? when we stopped it: \*([^*]*)\*", page)[1]
    assert f"**{said}.**" in (ROOT / "results.md").read_text(encoding="utf-8")


def test_the_readme_says_of_the_speed_what_the_page_of_speed_shows():
    rows = re.findall(
        r"^\| ([^|]+) \|(( [\d,]+ · [\d.]+ \|)+)", (ROOT / "docs" / "speed.md").read_text(encoding="utf-8"), re.M
    )
    speed = {name: [int(cell.replace(",", "")) for cell in re.findall(r"([\d,]+) ·", row)] for name, row, _ in rows}
    ours, peers = speed.pop("this project"), [row for name, row in speed.items() if "for comparison" not in name]
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    claim = (
        r"(\S+) times as fast as the fastest alternative in float32 \(Keras on JAX\), and more than twice as fast in"
    )
    factor = re.search(claim, page)
    assert len(peers) == 5
    [keras] = [row for name, row in speed.items() if name.startswith("Keras 3 on JAX")]
    assert all(keras[i] == max(row[i] for row in peers) for i in (0, 1))
    assert factor[1] == f"{min(ours[i] / keras[i] for i in (0, 1)):.2f}"
    assert all(ours[i] > 2 * max(row[i] for row in peers if len(row) > i) for i in (2, 3))


# What the pages refer to


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_and_every_path_leads_somewhere(path):
    page = path.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\.ci|benchmarks|core|examples|experiments|tests)/[\w./]*)`", page):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        file, _, heading = target.partition("#")
        if "://" in target:
            continue
        place = path.parent / file if file else path
        assert place.exists(), target
        found = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.M) if heading else []
        slugs = [re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in found]
        assert not heading or heading in slugs, target


def test_every_page_is_linked_from_the_readme():
    found = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "docs").iterdir() if f"](docs/{path.name})" not in found] == []


def test_every_place_names_the_same_versions_of_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups())
    versions = [f"3.{minor}" for minor in range(low, high)]
    assert project["classifiers"] == [f"Programming Language :: Python :: {version}" for version in versions]
    page = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    for each in (page, (ROOT / "README.md").read_text(encoding="utf-8")):
        assert f"Python {versions[0]} to {versions[-1]}." in each
    assert re.findall(r"^\| (3\.\d+) \|", page, re.M) == versions
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert f'python: ["{versions[0]}", "{versions[-1]}"]' in workflow


# The commands


def found_commands() -> dict[str, str]:
    """Every command of the pages, without its comment, and the page that has it: lines of ```sh blocks, and inline code
    that begins with a program."""
    found = {}
    for path in PAGES:
        page = path.read_text(encoding="utf-8").replace("\\\n", "")
        lines = [line for block in re.findall(r"^ *```sh\n(.*?)```", page, re.M | re.S) for line in block.splitlines()]
        prose = re.sub(r"(?ms)^ *```.*?```", "", page)
        lines += re.findall(r"`((?:uv|git|python|pip|srun|main\.py) [^`]+)`", " ".join(prose.split()))
        for line in lines:
            if command := " ".join(re.sub(r"(^|\s)#.*", "", line).split()):
                found.setdefault(command, path.name)
    return found


COMMANDS = found_commands()
MAIN = re.compile(r"(?:uv run (?:--group \S+ |--no-sync )*|python )?main\.py\b ?(.*)")
PYTEST = re.compile(r"uv run (?:--group \S+ )*pytest\b ?(.*)")

# What other tests do, or files have: the file, and words of the line.
ELSEWHERE = {
    "uv run dvc pull": ("tests/test_dvc.py", 'dvc(clone, "pull")'),
    "uv run dvc push": ("tests/test_dvc.py", 'dvc(project, "push")'),
    "uv run dvc remote add --default team /a/folder": ("tests/test_dvc.py", '"remote", "add", "--default", "team"'),
    'uv run dvc add --glob "checkpoints/*/*.safetensors"': ("tests/test_dvc.py", '"add", "--glob"'),
    "uv run dvc commit data.dvc": ("core/data/archive.py", "repo.commit(TRACKED, force=True)"),
    "uv run dvc metrics show": ("tests/test_dvc.py", 'dvc(project, "metrics", "show")'),
    "uv run dvc metrics diff HEAD~1": ("tests/test_dvc.py", '"metrics", "diff", "HEAD~1"'),
    "uv run dvc plots show": ("tests/test_dvc.py", 'dvc(project, "plots", "show")'),
    "uv run dvc plots diff HEAD~1": ("tests/test_dvc.py", '"plots", "diff", "HEAD~1"'),
    "uv run dvc exp show -n 5": ("tests/test_dvc.py", '"exp", "show", "-n"'),
    "uv run dvc config --local core.no_scm true": ("tests/test_dvc.py", '"config", "--local", "core.no_scm", "true"'),
    "git add .dvc/config checkpoints": ("tests/test_dvc.py", 'git(project, "add", "--all")'),
    'git commit -m "Runs, with weights"': ("tests/test_dvc.py", 'git(project, "commit"'),
    "uv run --group peers python -m benchmarks.gpu": ("tests/test_benchmarks.py", 'gpu.main([*limits, "--small"'),
    "uv run --group peers python -m benchmarks.gpu recipe": (
        "tests/test_benchmarks.py",
        'gpu.main([*limits, "--small"',
    ),
    "git checkout COMMIT": ("tests/test_checkout.py", '"checkout"'),
    "uv run ruff check .": (".ci/run", "ruff check ."),
    "uv run ruff format --check .": (".ci/run", "ruff format --check ."),
    "uv run mypy": (".ci/run", "run mypy"),
    "uv run python tests/test_docs.py": ("tests/test_docs.py", "path.write_text(make("),
    "uv run python tests/test_golden.py": ("tests/test_golden.py", '__name__ == "__main__"'),
    "uv run python -m tests.test_compare": ("tests/test_compare.py", "test_the_tables_of_the_page_are_current"),
    "uv run python -m examples.minimal": ("tests/test_examples.py", "train(data, resolve("),
    "uv run python examples/use_a_network.py network.pt2 photo.png": ("tests/test_examples.py", "use_a_network.py"),
    "uv run --group onnx main.py export demo --format onnx": ("tests/test_export.py", "params=FORMATS"),
    "uv run main.py export lr-1e-3 --format torch --output network.pt2": ("tests/test_export.py", "params=FORMATS"),
    "uv run main.py evaluate lr-1e-3 --data-folder photos --out photos-runs": (
        "tests/test_datasets.py",
        "test_every_command",
    ),
    "uv run main.py predict lr-1e-3 new.jpg --out photos-runs": ("tests/test_datasets.py", "test_every_command"),
    "uv run --group notebook --with jupyterlab jupyter lab": ("tests/test_notebook.py", "quickstart.ipynb"),
}

# What no test does, and why. A reason holds for the commands that begin with these words.
NOT_RUN = {
    "uv sync": "it installs software",
    "uv add": "it installs software",
    "uv pip install": "it installs software",
    "python -m pip install": "it installs software",
    "pip install": "it installs software",
    "python -m venv": "it installs software",
    "srun": "it needs SLURM",
    "uv run --group tensorboard tensorboard": "it serves pages until it is stopped",
}


def words_of(command: str) -> list[str]:
    """What main.py gets of a command, with the demo as CHECKPOINT; of a longer training, only what it would train."""
    words = shlex.split(re.split(" [|>] ", MAIN.fullmatch(command)[1])[0].replace("CHECKPOINT", "demo"))
    kind = words[0] if words and words[0] in parsers() else "run"
    trains = kind in ("run", "compare", "search") and "demo" not in words
    return [*words, "--dry-run"] if trains and not {"--dry-run", "--help"} & {*words} else words


@pytest.fixture
def ask(monkeypatch, tmp_path, capsys, photos):  # noqa: F811
    """Runs main.py in a folder with the records of a fresh clone, a trained demo, photos, and no data. Returns the
    status and the output."""
    monkeypatch.setattr(plots, "draw", lambda picture: b"<dc:identifier>" + 10 * plots.identifier(picture))
    monkeypatch.setattr(cache, "_candidates", lambda: [tmp_path])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    for name in SUITES[DEFAULT]:
        Path("checkpoints", name).mkdir(parents=True)
        for record in (ROOT / "checkpoints" / name).glob("*.json"):
            shutil.copy(record, Path("checkpoints", name))
    shutil.copytree(photos / "test" / "red", "pictures")
    shutil.copy("pictures/0.png", "photo.png")

    def ask(words):
        try:
            status = main.main(words)
        except SystemExit as end:  # --help
            status = end.code
        return status, "".join(capsys.readouterr())

    assert ask(["run", "demo"])[0] == 0
    return ask


def test_every_command_of_main_works(ask):
    for command, page in COMMANDS.items():
        if MAIN.fullmatch(command) and command not in ELSEWHERE:
            status, said = ask(words_of(command))
            assert status == 0, (page, command, said)


@pytest.mark.parametrize("command", [each for each in COMMANDS if PYTEST.fullmatch(each)])
def test_every_command_of_pytest_names_files_and_options_that_exist(command, pytestconfig):
    known, unknown = pytestconfig._parser.parse_known_and_unknown_args(shlex.split(PYTEST.fullmatch(command)[1]))
    assert unknown == []
    assert [name for name in known.file_or_dir if not (ROOT / name).exists()] == []


def test_every_other_command_is_done_elsewhere_or_has_a_reason():
    others = {each for each in COMMANDS if not PYTEST.fullmatch(each) and not MAIN.fullmatch(each)}
    reasons = {each: [start for start in NOT_RUN if each.startswith(start)] for each in others - ELSEWHERE.keys()}
    assert [each for each, starts in reasons.items() if not starts] == []
    assert {start for starts in reasons.values() for start in starts} == NOT_RUN.keys()
    assert ELSEWHERE.keys() - COMMANDS.keys() == set()
    for file, words in ELSEWHERE.values():
        assert words in (ROOT / file).read_text(encoding="utf-8"), (file, words)


def test_every_group_of_a_command_exists():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    assert {name for each in COMMANDS for name in re.findall(r"--group (\S+)", each)} <= groups.keys()


def test_an_archive_on_this_disk_and_a_folder_of_torchvision_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a b.tar.gz").touch()
    source = options.source(cli.parse(["--data-url", "a b.tar.gz"], main.PROJECT))
    assert source.url == (tmp_path / "a b.tar.gz").resolve().as_uri()
    url = f"http://x/{'y' * 1000}"
    assert options.source(cli.parse(["--data-url", url], main.PROJECT)).url == url
    assert torchvision.datasets.CIFAR10.base_folder == cifar10.ARCHIVE.folder


if __name__ == "__main__":
    for path, make in GENERATED.items():
        path.write_text(make(path.read_text(encoding="utf-8")), encoding="utf-8")
