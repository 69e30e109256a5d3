"""The commit of this code in Git, and its uncommitted changes."""

import contextlib
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
NEW = ("core/*.py", "experiments/*.py")  # files that belong to the code even before they are added to Git
LARGEST = 1 << 20  # bytes of a compressed diff that is kept


class Checkout(NamedTuple):
    """The code of this process in Git.

    Attributes:
        commit: Twelve digits, with a plus if the code differs from that commit; "unknown" if Git does not have it.
        diff: The input of `git apply` that turns that commit into this code; empty if they agree.
    """

    commit: str
    diff: bytes

    @property
    def digest(self) -> str:
        """sha256 of the diff; empty without one."""
        return hashlib.sha256(self.diff).hexdigest() if self.diff else ""


@functools.cache
def checkout() -> Checkout:
    """The code of this process, read once: later changes are not in this process."""
    return read(ROOT)


def read(root: Path) -> Checkout:
    """The code in a folder."""
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if _git(root, "ls-files", "main.py"):  # else it is a copy inside the repository of something else
            head = _git(root, "rev-parse", "--short=12", "HEAD").decode().strip()
            is_changed = _git(root, "status", "--porcelain", "--", *CODE)
            commit = f"{head}+" if is_changed else head
            return Checkout(commit, _diff(root) if is_changed else b"")
    return Checkout(commit, b"")


def _diff(root: Path) -> bytes:
    """The changes of tracked files, and the new Python files, since the last commit."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        index = Path(folder) / "index"  # a copy, to which the new files are added
        shutil.copy(root / os.fsdecode(_git(root, "rev-parse", "--git-path", "index").rstrip(b"\n")), index)
        if new := _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *NEW):
            names = [f":(literal){os.fsdecode(name)}" for name in new.rstrip(b"\0").split(b"\0")]
            _git(root, "add", "--intent-to-add", "--", *names, index=index)
        # Independent of the user's settings.
        plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/")
        return _git(root, "diff", *plain, "--binary", "--full-index", "HEAD", "--", *CODE, index=index)


def _git(root: Path, *arguments: str, index: Path | None = None) -> bytes:
    """The output of Git for the repository of a folder, whatever variables such as GIT_DIR say."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0"} | ({} if index is None else {"GIT_INDEX_FILE": str(index)})
    command = ("git", "-C", str(root), *arguments)
    return subprocess.run(command, capture_output=True, check=True, timeout=10, env=environment).stdout


def keep_diff(run: Run, made: Environment) -> None:
    """Keep the uncommitted changes of this code beside the record of a run, if the record names them and they are not
    too large. Otherwise delete the changes that an earlier run of the same id has left.

    Raises:
        core.store.StoreError: The file cannot be written.
    """
    code = checkout()
    packed = gzip.compress(code.diff, mtime=0) if code.diff and code.digest == made.diff else b""
    if packed and len(packed) <= LARGEST:
        atomic_write(run.diff, packed)
    else:
        delete(run.diff)
