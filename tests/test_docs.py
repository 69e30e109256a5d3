"""Pages of docs/ that are generated.

uv run python tests/test_docs.py      writes them anew
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core.report import stats, text  # noqa: E402
from core.spec import FIELDS  # noqa: E402

SPEC_KEYS = ROOT / "docs" / "spec-keys.md"


INTRODUCTION = """# Spec keys

A spec is a dict with some of these keys (`uv run main.py list --keys`). A key that is left out has its default.

On the command line, any key can be changed: `uv run main.py run lr-1e-3 dropout=0.1 "widths=512,256"`. Several values
make a grid: `"lr=1e-3,5e-4"`, `"activation=relu,gelu"`, `"widths=512,256/1024"` (two lists). Quote a word that has a
comma: PowerShell would split it.

Each value of a key that is compiled in needs a compilation of its own. The other keys reach the train step as tensors,
so one compilation serves all their values.

"""


def spec_keys() -> str:
    rows = [
        (f"`{key}`", stats.shown(field.default), str(field.values), field.meaning, "no" if field.dynamic else "yes")
        for key, field in FIELDS.items()
    ]
    return INTRODUCTION + text.grid(("key", "default", "values", "meaning", "compiled in"), rows)


def test_the_page_of_spec_keys_is_current():
    assert SPEC_KEYS.read_text(encoding="utf-8") == spec_keys()


def test_every_place_names_the_same_versions_of_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups())
    versions = [f"3.{minor}" for minor in range(low, high)]
    assert project["classifiers"] == [f"Programming Language :: Python :: {version}" for version in versions]
    page = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    assert f"Python {versions[0]} to {versions[-1]}." in page
    assert re.findall(r"^\| (3\.\d+) \|", page, re.M) == versions
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert f'python: ["{versions[0]}", "{versions[-1]}"]' in workflow


if __name__ == "__main__":
    SPEC_KEYS.write_text(spec_keys(), encoding="utf-8")
