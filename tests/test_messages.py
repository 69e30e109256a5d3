"""What a message recommends is done here: every command and option that a message of core/ names."""

import ast
import functools
import re
import shlex
import tomllib

import pytest

from core.code_hash import CODE
from tests.conftest import ROOT
from tests.test_datasets import photos, small_cifar100  # noqa: F401 - fixtures
from tests.test_lookback import ask  # noqa: F401 - a fixture

DEMO = ("run", "demo", "widths=8", "epochs=1")
SMOKE = ("run", "smoke", "widths=8", "epochs=1", "batch_size=9", "--no-compile")


def edit(path, old, new):
    path.write_text(re.sub(old, new, path.read_text()))


def damage(path, *_):
    path.unlink()
    path.with_suffix(".step-0000000001.safetensors").write_bytes(b"")


# What is done to the record of a finished run, if there is one; a command; words of its message; what follows them.
CASES = [
    (None, ("evaluate",), "`uv run main.py` trains some", ("--dry-run",)),
    (None, ("evaluate", "demo", "--seed", 1), "`uv run main.py run demo --seed 1` trains it", (*DEMO, "--seed", 1)),
    (None, ("verify", "demo"), "`uv run main.py run demo`, with the same options, trains it", DEMO),
    (None, ("--nonsense",), "see main.py --help", ("--help",)),
    (None, ("evaluate", "nothing"), "names are in `main.py list`", ("list",)),
    (None, (*DEMO, "seed=1,2"), "one seed; --seeds trains several", (*DEMO, "--seeds", "1,2")),
    (None, (*SMOKE, "dataset=folder-0123456789ab"), "--data-folder says where", (*SMOKE, "--data-folder", "PHOTOS")),
    (
        None,
        (*SMOKE, "--data-folder", "PHOTOS/train"),
        "--test-share 0.2",
        (*SMOKE, "--data-folder", "PHOTOS/train", "--test-share", 0.2),
    ),
    (
        None,
        (*SMOKE, "dataset=cifar100", "--data", "OUT/x"),
        "with --data-url file:///FOLDER/cifar-100-python.tar.gz",
        (*SMOKE, "dataset=cifar100", "--data", "OUT/x", "--data-url", "ARCHIVE"),
    ),
    (
        None,
        (*SMOKE, "dataset=cifar100", "--data", "OUT/x"),
        "with --data FOLDER",
        (*SMOKE, "dataset=cifar100", "--data", "PUBLISHED"),
    ),
    (None, ("report",), "--out names another folder", ("report", "--out", "OTHER")),
    (lambda path: None, DEMO, "--force trains it again", (*DEMO, "--force")),
    (lambda path: None, ("clean", "--weights", "demo"), "--yes deletes them", ("clean", "--weights", "demo", "--yes")),
    (lambda path: edit(path, CODE, "0" * 12), DEMO, "--force trains them anew", (*DEMO, "--force")),
    (
        lambda path: edit(path, '"data": "[^"]*"', '"data": "x"'),
        DEMO,
        "or replace it with `run` and --force",
        (*DEMO, "--force"),
    ),
    (
        lambda path: edit(path, '"data": "[^"]*"', '"data": "x"'),
        DEMO,
        "another folder with --out",
        (*DEMO, "--out", "OTHER"),
    ),
    (damage, DEMO, "--force starts anew", (*DEMO, "--force")),
]

# What other tests do: their file, and words of the line that does it. Two install software: these are compared as text.
ELSEWHERE = {
    "main.py compare": ("test_compare.py", '"compare"'),
    "main.py search": ("test_search.py", '"search"'),
    "--trials": ("test_search.py", '"--trials"'),
    "--install": ("test_compile.py", "xcode-select --install"),
    "--python": ("test_remote.py", "uv run --python 3.13"),
    "kill -CONT {}": ("test_store.py", "send_signal(signal.SIGCONT)"),
    "uv run dvc pull": ("test_dvc.py", 'dvc(clone, "pull")'),
    "uv run main.py report": ("test_cli.py", 'call("report"'),
    "--resume-anyway": ("test_reproducible.py", "exact=False"),
    "--ray": ("test_remote.py", '"--ray"'),
}


@pytest.mark.parametrize(("left", "first", "words", "then"), CASES, ids=[case[2] for case in CASES])
def test_what_a_message_recommends_works(ask, request, tmp_path, left, first, words, then):  # noqa: F811
    def place(match):
        if match[0] in ("OUT", "OTHER"):
            return str(tmp_path / match[0].lower())
        if match[0] == "PHOTOS":
            return str(request.getfixturevalue("photos"))
        published, archive = request.getfixturevalue("small_cifar100")
        return str(published) if match[0] == "PUBLISHED" else archive.as_uri()

    def do(argv):
        try:
            return ask(*(re.sub("^(OUT|OTHER|PHOTOS|PUBLISHED|ARCHIVE)", place, str(word)) for word in argv))
        except SystemExit as end:  # --help
            return end.code, "", ""

    if "OTHER" in then:
        assert do((*DEMO, "--out", "OTHER"))[0] == 0
    if left:
        assert do(DEMO)[0] == 0
        left(*tmp_path.glob("checkpoints/demo/*.json"))
    _, out, said = do(first)
    assert words in out + said
    status, out, said = do(then)
    assert status == 0, said
    assert words not in out + said


def test_the_commands_of_a_report_work(ask, tmp_path):  # noqa: F811
    assert ask(*DEMO)[0] == 0
    commands = re.findall("^uv run main.py (.*)$", (tmp_path / "results.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        status, _, said = ask(*shlex.split(command))
        assert status == 0, said


@functools.cache
def templates():
    """The texts in core/ that are no docstring, no option of a parser and no help of one, with {} for each value."""
    found = []
    for path in sorted((ROOT / "core").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        left = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        left |= {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.keyword) and each.arg == "help"}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                left |= {id(part) for part in node.values}
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                text = "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if id(node) not in left and (" " in text or "`" in text):
                found.append(text)
    return found


def test_every_recommendation_is_followed_by_a_test():
    options, commands = set(), set()
    for text in templates():
        commands.update(re.findall(r"`((?:uv|main\.py|kill|mv) [^`]*)`", text))
        if not re.match(r"--[a-z-]+ \{", text):  # it says what is wrong with the value of an option
            options.update(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub("`[^`]*`", "", text)))
    assert {"--force", "--data-url"} < options
    assert "uv run main.py" in commands
    followed = " ".join(case[2] for case in CASES)
    patterns = {each: re.escape(each).replace(r"\{\}", ".*?") for each in options | commands if "--group" not in each}
    missing = {each for each, pattern in patterns.items() if not re.search(rf"{pattern}(?![\w-])", followed)}
    assert missing == ELSEWHERE.keys()
    for file, words in ELSEWHERE.values():
        assert words in (ROOT / "tests" / file).read_text(encoding="utf-8"), file


def test_every_group_that_a_message_names_exists():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    named = {name for text in templates() for name in re.findall(r"--group (\S+)", text)}
    assert named >= {"ray", "tensorboard", "{}"}  # {}: onnx
    assert named - {"{}"} <= groups.keys()
