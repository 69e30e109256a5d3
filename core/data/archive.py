"""Published archives: find or fetch the files, and check every byte before anything reads them."""

import base64
import hashlib
import http.client
import io
import pickle
import re
import shutil
import tarfile
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from core.data.tensors import DataError
from core.store import delete, locked, read_file, replace

ROOT = Path(__file__).resolve().parents[2]
TRACKED = str(ROOT / "data.dvc")  # DVC takes a relative path from the current folder
DIRECTORY_HASH = "15fc275e5cae3db098ab0f217a684a1f.dir"  # of the files that it names, those of CIFAR-10
MAX_BYTES = 1 << 29  # of a file whose size is not published

PATIENCE = 60.0  # seconds over which the speed of a download is measured
SLOWEST = 8_000  # bytes a second; at this speed the archive takes six hours
# The user and the password in an address; a password may hold a slash that should be written as %2F.
USER = re.compile(r"(?<=://)(?:[^/?#\s]*|[^/\s]*:\S*)@")

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


class Archive(NamedTuple):
    """An archive of a data set in Python's pickle format, as its authors published it.

    Attributes:
        title: of the data set, in messages.
        folder: in which the archive has its files.
        files: for each file its md5, and its size in bytes, or None where that is not published.
        md5, size: of the archive.
        addresses: where it can be fetched; the first is that of its authors.
        tracked: whether data.dvc names these files.
    """

    title: str
    folder: str
    files: dict[str, tuple[str, int | None]]
    md5: str
    size: int
    addresses: tuple[str, ...]
    tracked: bool = False

    def read(self, folder: Path, name: str) -> dict[bytes, Any]:
        """The content of a file. Its bytes are checked, and the same bytes are unpickled.

        Raises:
            DataError: It is missing, or not the published one.
        """
        return pickle.loads(self.verified(folder, name), encoding="bytes")

    def verified(self, folder: Path, name: str) -> bytes:
        """The bytes of one file.

        Raises:
            DataError: it cannot be read, or its size or md5 is not the published one.
        """
        path = folder / self.folder / name
        md5, size = self.files[name]
        try:
            data = read_file(path, MAX_BYTES if size is None else size)
            if size is not None and len(data) != size:
                raise ValueError(f"it has {len(data):,} bytes, expected {size:,}")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DataError(f"cannot read {path}: {reason}; {_remedy(path)}") from None
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if digest != md5:
            raise DataError(f"{path} is altered: its md5 is {digest}, expected {md5}; {_remedy(path)}")
        return data

    def missing(self, folder: Path) -> list[str]:
        return [name for name in self.files if not (folder / self.folder / name).exists()]

    def fetch(self, folder: Path, url: str | None = None, progress: Progress = lambda *_: None) -> None:
        """Bring the missing files: through DVC where `folder` is the project's data/, otherwise from the mirrors, `url`
        first.

        Raises:
            DataError: nothing delivered them. core.store.StoreError: the folder cannot be locked.
        """
        if not self.missing(folder):
            return
        try:
            (folder / self.folder).mkdir(parents=True, exist_ok=True)
            lock, owner = (Path(f"{folder.resolve()}.{kind}") for kind in ("lock", "owner"))
            with locked(lock, owner):
                for left in (folder / self.folder).glob("*.tmp"):  # by a killed process; DVC would not go on beside it
                    delete(left)
                self._fetch(folder, url, progress)
        except OSError as error:
            raise DataError(f"cannot write into {folder / self.folder}: {error.strerror or error}") from None

    def _fetch(self, folder: Path, url: str | None, progress: Progress) -> None:
        absent = self.missing(folder)
        for name in self.files:
            if name not in absent:
                self.verified(folder, name)  # existing files first, so that the error names the bad one
        tried = []
        tracked = self.tracked and folder.resolve() == (ROOT / "data").resolve()  # it may be a link
        if tracked:
            problem = _dvc(lambda repo: repo.pull(TRACKED))
            if not self.missing(folder):
                return
            tried.append(f"  DVC: {problem or 'the pull left files missing'}")
        for address in ((url,) if url else ()) + self.addresses:
            try:
                self._download(address, folder, progress)
                break
            except OSError as error:
                tried.append(f"  {_words(address)}: {_words(_reason(error))}")
        else:
            absent, again, official = self.missing(folder), "run the same command again", self.addresses[0]
            lacks = ", ".join(absent) if len(absent) < len(self.files) else f"the files of {self.title}"
            raise DataError(
                f"{folder / self.folder} lacks {lacks}, and nothing delivered them:",
                *tried,
                f"With a network, {again}{', or `uv run dvc pull`' if tracked else ''}.",
                f"With a copy of the archive, {again} with --data-url file:///FOLDER/{PurePosixPath(official).name}.",
                f"With a copy of the files, {again} with --data FOLDER, where FOLDER/{self.folder} holds them.",
            )
        if tracked and sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(self.files):
            for name in self.files:
                self.verified(folder, name)
            # It is what data.dvc names; now DVC has it in its cache, as after a pull.
            _dvc(lambda repo: repo.commit(TRACKED, force=True))

    def _download(self, address: str, folder: Path, progress: Progress) -> None:
        """Fetch the official archive and extract its files; nothing is written before its md5 is right."""
        digest = hashlib.md5(usedforsecurity=False)
        with tempfile.TemporaryFile() as archive:
            try:
                with urllib.request.urlopen(_request(address), timeout=30) as response:
                    for chunk in _chunks(response, _words(address), self.size, progress):
                        digest.update(chunk)
                        archive.write(chunk)
            except (ValueError, http.client.HTTPException) as error:  # not an address, or not a web server
                # The error may quote a part of the password.
                raise OSError(
                    "no address, or no web server; is the password %-escaped?" if "@" in address else error
                ) from None
            if digest.hexdigest() != self.md5:
                raise OSError(f"md5 {digest.hexdigest()}, expected {self.md5}")
            archive.seek(0)
            (folder / self.folder).mkdir(parents=True, exist_ok=True)  # DVC takes the folder away when it fails
            with tarfile.open(fileobj=archive) as tar:
                for name in self.missing(folder):
                    target = folder / self.folder / name
                    member = tar.extractfile(f"{self.folder}/{name}")
                    assert member is not None
                    temporary = target.with_name(name + ".tmp")
                    with member, open(temporary, "wb") as out:
                        shutil.copyfileobj(member, out)
                    replace(temporary, target)


def _remedy(path: Path) -> str:
    # Outside the data folder: DVC does not fetch into a folder with other files.
    aside = path.parents[1].resolve().parent / f"{path.name}.old"
    return f"move it to {aside} and run the command again to fetch it anew"


def _dvc(command: Callable[[Any], Any]) -> str | None:
    """Run a command on the project's DVC repository; returns what went wrong."""
    try:  # DVC takes a second to import: only where it is needed
        import logging

        from dvc.repo import Repo

        for name in ("dvc", "dvc_data", "dvc_objects"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        in_git = (ROOT / ".git").exists()
        with Repo(str(ROOT), config=None if in_git else {"core": {"no_scm": True}}) as repo:
            command(repo)
        return None
    except Exception as error:  # whatever is wrong with the remote, the mirrors are next
        return _words(error) or type(error).__name__


def _words(said: object) -> str:
    """A message of a library, or an address, as a short line without escape codes and without a password."""
    return " ".join(USER.sub("", re.sub(r"\x1b\[[0-9;]*m", "", str(said))).split())[:200]


def _reason(error: OSError) -> object:
    reason = getattr(error, "reason", error)  # of a URLError
    return reason.strerror or reason if isinstance(reason, OSError) else reason


def _chunks(response: io.BufferedIOBase, address: str, size: int, progress: Progress) -> Iterator[bytes]:
    """The bytes of a response as they come.

    Raises:
        OSError: they come too slowly, or are not as many as expected.
    """
    done = before = 0
    since = time.monotonic()
    while chunk := response.read1(1 << 20):  # `read` would wait for all of them
        done += len(chunk)
        progress(address, done, size)
        if done > size:
            raise OSError(f"more than the expected {size:,} bytes")
        if (took := time.monotonic() - since) > PATIENCE:
            speed = (done - before) / took
            if speed < SLOWEST:
                raise OSError(f"too slow: {speed:,.0f} bytes a second, expected at least {SLOWEST:,}")
            before, since = done, since + took
        yield chunk
    if done < size:
        raise OSError(f"it ended after {done:,} bytes, expected {size:,}")


def _request(address: str) -> urllib.request.Request:
    """A request that sends user and password as a web server expects them, but not to the server of a redirect."""
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at or parts.scheme not in ("http", "https"):
        return urllib.request.Request(address)
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    request.add_unredirected_header("Authorization", f"Basic {token}")
    return request
