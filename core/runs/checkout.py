"""What Git says of this code: its commit, and how it differs from that commit."""

import functools
import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from core.runs.record import Environment
from core.runs.run import Run
from core.store import atomic_write, delete

ROOT = Path(__file__).resolve().parents[2]
CODE = ("core", "experiments", "main.py", "pyproject.toml")
NEW = ("core/*.py", "experiments/*.py")  # new files that belong to the code before Git knows them
LARGEST = 1 << 20  # bytes of a compressed diff that is kept


class Checkout(NamedTuple):
    """The code of this process in Git.

    Attributes:
        commit: Twelve digits, with a plus where the code differs from that commit; "unknown" where Git does not have
            this code.
        diff: What `git apply` turns that commit into this code with; empty where they agree.
    """

    commit: str
    diff: bytes

    @property
    def digest(self) -> str:
        """sha256 of the diff; empty without one."""
        return hashlib.sha256(self.diff).hexdigest() if self.diff else ""


@functools.cache
def checkout() -> Checkout:
    """The code of this process, as it is when this is first asked: later changes are not in this process."""
    return read(ROOT)


def read(root: Path) -> Checkout:
    """The code in a folder."""
    try:
        if not _git(root, "ls-files", "main.py"):  # a copy inside the repository of something else
            return Checkout("unknown", b"")
        commit = _git(root, "rev-parse", "--short=12", "HEAD").decode().strip()
        changed = _git(root, "status", "--porcelain", "--", *CODE)
    except (OSError, subprocess.SubprocessError):
        return Checkout("unknown", b"")
    if not changed:
        return Checkout(commit, b"")
    try:
        return Checkout(f"{commit}+", _diff(root))
    except (OSError, subprocess.SubprocessError):
        return Checkout(f"{commit}+", b"")


def _diff(root: Path) -> bytes:
    """The difference of tracked files and new Python files to the last commit."""
    with tempfile.TemporaryDirectory() as folder:
        # In a copy of Git's index: there new files may become known to it.
        index = Path(folder) / "index"
        shutil.copy(root / os.fsdecode(_git(root, "rev-parse", "--git-path", "index").rstrip(b"\n")), index)
        if new := _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *NEW):
            names = [f":(literal){os.fsdecode(name)}" for name in new.rstrip(b"\0").split(b"\0")]
            _git(root, "add", "--intent-to-add", "--", *names, index=index)
        # Whatever the settings of the user say about how a diff looks.
        plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/")
        return _git(root, "diff", *plain, "--binary", "--full-index", "HEAD", "--", *CODE, index=index)


def _git(root: Path, *arguments: str, index: Path | None = None) -> bytes:
    """What Git answers about the repository of a folder; variables such as GIT_DIR may name another one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0"} | ({} if index is None else {"GIT_INDEX_FILE": str(index)})
    command = ("git", "-C", str(root), *arguments)
    return subprocess.run(command, capture_output=True, check=True, timeout=10, env=environment).stdout


def keep_diff(run: Run, made: Environment) -> None:
    """Keep the uncommitted changes of this code beside the record of a run, if they are those that it names and are
    not too large; else delete what an earlier run of the same id has left.

    Raises:
        core.store.StoreError: It cannot be written.
    """
    found = checkout()
    packed = gzip.compress(found.diff, mtime=0) if found.diff and found.digest == made.diff else b""
    if packed and len(packed) <= LARGEST:
        atomic_write(run.diff, packed)
    else:
        delete(run.diff)
