"""CIFAR-10 comes from DVC or a mirror, or an error names the file and a remedy. No altered file is unpickled."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from core import spec
from core.data import archive as archives
from core.data import cifar10
from core.data.tensors import DataError
from tests.conftest import REMOTE, ROOT, lacking

DEAD = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # the discard port: refused at once


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def batch(i, count):
    """One of the six files of images. Each image is grey, and one of its columns counts the images."""
    images = np.full((count, 3072), i, dtype=np.uint8)
    images[:, 1] = np.arange(count) % 251
    return pickle.dumps({b"data": images, b"labels": [(i + n) % 10 for n in range(count)]}, protocol=2)


def packed(files):
    """A tar.gz of them, with a file beside the seven, as the official archive has."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for name, data in {**files, "readme.html": b"<html>"}.items():
            info = tarfile.TarInfo(f"{cifar10.ARCHIVE.folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@functools.cache
def contents(count):
    """Name -> bytes of an invented CIFAR-10 with so many images a file, and its archive."""
    names = list(cifar10.ARCHIVE.files)
    files = {name: batch(i, count) for i, name in enumerate(names[:6])} | {"batches.meta": b"labels" * 20}
    return files, packed(files)


full_size = pytest.mark.parametrize("fake", [10_000], indirect=True, ids=["full size"])  # for tests that read tensors


@pytest.fixture
def fake(request, monkeypatch):
    """An invented CIFAR-10, small unless `full_size`, as the published one, with no mirror that answers."""
    files, archive = contents(getattr(request, "param", 20))
    invented = cifar10.ARCHIVE._replace(
        files={name: (md5(data), len(data)) for name, data in files.items()},
        md5=md5(archive),
        size=len(archive),
        addresses=(DEAD,),
    )
    monkeypatch.setattr(cifar10, "ARCHIVE", invented)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return files, archive


@pytest.fixture
def serve():
    """A server on loopback: serve({path: page}) gives its address; `serve.asked` are the paths it was asked for."""
    servers = []
    asked: list[str] = []

    def start(pages):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                page = pages.get(self.path)
                if page == "garbage":
                    self.wfile.write(b"this is no HTTP at all\r\n\r\n")
                elif page == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b"x" * 10)
                elif page is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(page)))
                    self.end_headers()
                    self.wfile.write(page)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    start.asked = asked
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def filled(fake, tmp_path):
    """A data folder with the invented seven files."""
    (tmp_path / cifar10.ARCHIVE.folder).mkdir()
    for name, data in fake[0].items():
        (tmp_path / cifar10.ARCHIVE.folder / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def no_pickle(monkeypatch):
    """Fails the test if anything is unpickled: to unpickle a file is to run it."""

    def refuse(*_, **__):
        raise AssertionError("unpickled what was not verified")

    for name in ("loads", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


SEVEN = sorted(f"{cifar10.ARCHIVE.folder}/{name}" for name in cifar10.ARCHIVE.files)


def test_hashes_are_those_that_torchvision_publishes():
    from torchvision.datasets import CIFAR10

    published = dict([*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    assert {name: md5 for name, (md5, _) in cifar10.ARCHIVE.files.items()} == published
    assert CIFAR10.tgz_md5 == cifar10.ARCHIVE.md5
    assert CIFAR10.base_folder == cifar10.ARCHIVE.folder
    assert cifar10.ARCHIVE.addresses[0].removeprefix("https") == CIFAR10.url.removeprefix("https")


def test_data_dvc_tracks_the_directory_of_these_files():
    """The hash of a DVC directory is the md5 of its listing, which follows from the hashes of the files."""
    entries = sorted((f"{cifar10.ARCHIVE.folder}/{name}", md5) for name, (md5, _) in cifar10.ARCHIVE.files.items())
    listed = "[" + ", ".join(f'{{"md5": "{md5}", "relpath": "{path}"}}' for path, md5 in entries) + "]"
    assert md5(listed.encode()) + ".dir" == cifar10.DIRECTORY_HASH
    tracked = (ROOT / "data.dvc").read_text()
    assert f"md5: {cifar10.DIRECTORY_HASH}\n" in tracked
    assert f"size: {sum(size for _, size in cifar10.ARCHIVE.files.values())}\n" in tracked


@full_size
def test_read_puts_every_image_and_label_in_its_place(filled):
    data = cifar10.read(filled)
    assert [tuple(t.shape) for t in data.tensors.values()] == [(50_000, 3072), (50_000,), (10_000, 3072), (10_000,)]
    assert [t.dtype for t in data.tensors.values()] == [torch.uint8, torch.int64] * 2
    assert data.train_images[:, 0].tolist() == [i // 10_000 for i in range(50_000)]
    assert (data.test_images[:, 0] == 5).all()
    assert data.train_images[20_300, 1] == 300 % 251
    assert data.train_labels[30_004] == 7
    assert data.test_labels[:3].tolist() == [5, 6, 7]


def test_real_data(data_dir):
    real = cifar10.read(data_dir)
    assert real.train_labels.bincount().tolist() == [5000] * 10
    assert real.test_labels.bincount().tolist() == [1000] * 10
    first = [spec.CIFAR10.classes[label] for label in real.test_labels[:4]]
    assert first == ["cat", "ship", "ship", "airplane"]
    assert real.train_images[0, [0, 1024, 2048]].tolist() == [59, 62, 63]  # red, green and blue of the first pixel


def test_complete_data_is_not_fetched(filled, monkeypatch):
    monkeypatch.setattr(archives.Archive, "_download", None)
    monkeypatch.setattr(archives, "_dvc", None)
    cifar10.ARCHIVE.fetch(filled)


@full_size
def test_a_mirror_provides_the_seven_files_and_no_other(fake, serve, tmp_path, monkeypatch):
    files, archive = fake
    monkeypatch.setattr(cifar10, "ARCHIVE", cifar10.ARCHIVE._replace(addresses=(DEAD, serve({"/a": archive}) + "/a")))
    progress = []
    data = cifar10.load(tmp_path, progress=lambda *event: progress.append(event))
    assert listing(tmp_path) == SEVEN
    assert all((tmp_path / cifar10.ARCHIVE.folder / name).read_bytes() == content for name, content in files.items())
    assert len(data.train_labels) == 50_000
    assert progress[-1] == (cifar10.ARCHIVE.addresses[1], len(archive), len(archive))


def test_the_address_that_was_given_comes_first(fake, serve, tmp_path, monkeypatch):
    base = serve({"/mine": fake[1], "/official": fake[1]})
    monkeypatch.setattr(cifar10, "ARCHIVE", cifar10.ARCHIVE._replace(addresses=(base + "/official",)))
    cifar10.ARCHIVE.fetch(tmp_path, base + "/mine")
    assert serve.asked == ["/mine"]


def test_an_address_that_fails_is_followed_by_the_mirrors(fake, serve, tmp_path, monkeypatch):
    base = serve({"/official": fake[1]})
    monkeypatch.setattr(cifar10, "ARCHIVE", cifar10.ARCHIVE._replace(addresses=(base + "/official",)))
    cifar10.ARCHIVE.fetch(tmp_path, base + "/mine")
    assert serve.asked == ["/mine", "/official"]
    assert listing(tmp_path) == SEVEN


def test_only_what_is_missing_is_replaced(fake, serve, filled):
    kept, lost = (filled / cifar10.ARCHIVE.folder / name for name in ("data_batch_2", "test_batch"))
    lost.unlink()
    before = kept.stat()
    cifar10.ARCHIVE.fetch(filled, serve({"/a": fake[1]}) + "/a")
    assert lost.read_bytes() == fake[0]["test_batch"]
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("page", ["altered", "short", "long", "none", "garbage", "cut"])
def test_a_bad_archive_is_refused_and_leaves_nothing(fake, serve, tmp_path, page, no_pickle):
    archive = fake[1]
    pages = {
        "altered": archive[:-100] + bytes([archive[-100] ^ 1]) + archive[-99:],
        "short": archive[:-1],
        "long": archive + b"x",
    }
    address = serve({"/a": pages.get(page, page if page in ("garbage", "cut") else None)}) + "/a"
    with pytest.raises(DataError) as refused:
        cifar10.load(tmp_path, address)
    assert refused.value.args[1].startswith(f"  {address}: ")
    assert one_line_each(refused)
    assert listing(tmp_path) == []


@pytest.fixture
def busy(fake, monkeypatch):
    """A server that answers with a function of its handler, and the address."""
    servers = []

    def start(answer):
        handler = type("Handler", (http.server.BaseHTTPRequestHandler,), {"do_GET": answer, "log_message": print})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/a"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_slow_download_is_given_up_with_a_message(busy, tmp_path, monkeypatch):
    """A byte now and then, so that no single wait reaches the timeout."""
    monkeypatch.setattr(archives, "PATIENCE", 0.3)

    def trickle(handler):
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):  # the other side has given up
            for _ in range(3000):
                handler.wfile.write(b"x")
                time.sleep(0.01)

    with pytest.raises(DataError) as refused:
        cifar10.load(tmp_path, busy(trickle))
    assert re.search(r"/a: too slow: \d+ bytes a second, expected at least 8,000$", refused.value.args[1])


@full_size
def test_a_download_may_pause(busy, fake, tmp_path, monkeypatch):
    """What counts is the speed over the whole of PATIENCE."""
    monkeypatch.setattr(archives, "PATIENCE", 0.3)

    def pause(handler):
        handler.send_response(200)
        handler.end_headers()
        half = len(fake[1]) // 2
        for part in (fake[1][:half], fake[1][half:]):
            handler.wfile.write(part)
            time.sleep(0.2)

    cifar10.load(tmp_path, busy(pause))
    assert listing(tmp_path) == SEVEN


def test_a_loop_of_redirects_is_reported_in_one_line(busy, tmp_path):
    def to_itself(handler):
        handler.send_response(302)
        handler.send_header("Location", "/a")
        handler.end_headers()

    with pytest.raises(DataError, match="redirect error that would lead to an infinite loop") as refused:
        cifar10.load(tmp_path, busy(to_itself))
    assert one_line_each(refused)


def test_a_password_in_an_address_is_used_and_never_shown(busy, fake, tmp_path):
    """It is sent to its own server, and not to the server that this one redirects to."""
    asked = []

    def ask(handler):
        asked.append((handler.path, handler.headers["Authorization"]))
        if handler.path == "/a":
            handler.send_response(302)
            handler.send_header("Location", "/b")
            handler.end_headers()
        else:
            handler.send_error(403)

    address = busy(ask).replace("//", "//me:sec%2Fret@")
    with pytest.raises(DataError) as refused:
        cifar10.load(tmp_path, address)
    assert asked == [("/a", "Basic bWU6c2VjL3JldA=="), ("/b", None)]  # me:sec/ret
    assert "sec" not in str(refused.value)
    assert refused.value.args[1] == f"  {address.replace('me:sec%2Fret@', '')}: Forbidden"


@pytest.mark.parametrize(
    "address",
    ["http://me:sec/ret@127.0.0.1:9/a", "http://me:sec@ret@127.0.0.1:9/a", "ftp://me:secret@127.0.0.1:9/a"],
)
def test_a_password_that_breaks_the_address_is_not_shown_either(fake, tmp_path, address):
    shown = []
    with pytest.raises(DataError) as refused:
        cifar10.load(tmp_path, address, lambda what, *_: shown.append(what))
    assert "sec" not in "".join((*refused.value.args, *shown))


def one_line_each(refused):
    """Whether nothing in a paragraph ends a line but its lines."""
    return all(line.isprintable() for line in refused.value.args)


@pytest.mark.parametrize(
    "address",
    ["nonsense", "http://", "http://a b/c", "ftp://127.0.0.1:9/x", "file:///nowhere/x", "http://127.0.0.1:x/"],
)
def test_an_invalid_address_is_refused(fake, tmp_path, address):
    with pytest.raises(DataError) as refused:
        cifar10.load(tmp_path, address)
    assert refused.value.args[1].startswith(f"  {address}: ")
    assert one_line_each(refused)


def test_data_that_cannot_be_fetched_is_reported_with_remedies(fake, tmp_path):
    with pytest.raises(DataError) as refused:
        cifar10.load(tmp_path)
    assert refused.value.args == (
        f"{tmp_path / cifar10.ARCHIVE.folder} lacks the files of CIFAR-10, and nothing delivered them:",
        f"  {DEAD}: Connection refused",
        "With a network, run the same command again.",  # not `dvc pull`, which fills data/ and not this folder
        "With a copy of the archive, run the same command again with --data-url file:///FOLDER/cifar-10-python.tar.gz.",
        "With a copy of the files, run the same command again with --data FOLDER, where "
        f"FOLDER/{cifar10.ARCHIVE.folder} holds them.",
    )


def test_an_error_of_dvc_is_a_line_without_escape_codes(fake, tmp_path, monkeypatch):
    """The real message ends in a coloured link."""

    def fails(*_, **__):
        raise RuntimeError("Checkout failed:\ndata\n<\x1b[36mhttps://me:secret@dvc.org/missing\x1b[39m>")

    monkeypatch.setattr("dvc.repo.Repo", fails)
    monkeypatch.setattr(archives, "ROOT", tmp_path)
    with pytest.raises(DataError) as refused:
        cifar10.load(tmp_path / "data")
    first, dvc, _, retry, *_ = refused.value.args
    assert "lacks the files of CIFAR-10" in first
    assert dvc == "  DVC: Checkout failed: data <https://dvc.org/missing>"
    assert retry == "With a network, run the same command again, or `uv run dvc pull`."


def test_a_missing_file_is_named(fake, filled):
    (filled / cifar10.ARCHIVE.folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_4, and nothing delivered them:\n"):
        cifar10.load(filled)


def test_an_altered_file_is_named_rather_than_a_missing_one(fake, filled):
    (filled / cifar10.ARCHIVE.folder / "data_batch_4").unlink()
    (filled / cifar10.ARCHIVE.folder / "batches.meta").write_bytes(b"x" * cifar10.ARCHIVE.files["batches.meta"][1])
    with pytest.raises(DataError, match=r"batches\.meta is altered"):
        cifar10.load(filled)


def test_a_file_in_the_place_of_the_folder(fake, tmp_path):
    (tmp_path / cifar10.ARCHIVE.folder).write_text("mine")
    with pytest.raises(DataError, match=rf"^cannot write into {tmp_path / cifar10.ARCHIVE.folder}: File exists$"):
        cifar10.load(tmp_path)
    assert (tmp_path / cifar10.ARCHIVE.folder).read_text() == "mine"


@pytest.mark.parametrize("name", cifar10.ARCHIVE.files)
def test_one_flipped_bit_is_refused_and_never_unpickled(filled, name, no_pickle):
    """Its size and time stay the same. Some tools look at nothing else."""
    path = filled / cifar10.ARCHIVE.folder / name
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(DataError) as refused:
        cifar10.ARCHIVE.verified(filled, name)
    assert f"{path} is altered" in str(refused.value)
    assert f"move it to {filled.parent / name}.old and run the command again" in str(refused.value)


def test_load_refuses_before_it_unpickles_an_altered_file(filled, no_pickle):
    path = filled / cifar10.ARCHIVE.folder / "data_batch_1"
    path.write_bytes(b"c" + path.read_bytes()[1:])
    with pytest.raises(DataError, match="data_batch_1 is altered"):
        cifar10.load(filled)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"", lambda data: data + b"x"])
def test_a_file_of_another_size_is_refused(filled, change, no_pickle):
    path = filled / cifar10.ARCHIVE.folder / "data_batch_1"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        DataError,
        match=rf"^cannot read {path}: it has [\d,]+ bytes, expected [a-z ]*[\d,]+; move it to [^\n]*$",
    ):
        cifar10.load(filled)


def test_a_folder_in_the_place_of_a_file_is_refused(filled):
    path = filled / cifar10.ARCHIVE.folder / "batches.meta"
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=rf"^cannot read {path}: Is a directory; move it to [^\n]*$"):
        cifar10.load(filled)


@full_size
def test_the_bytes_that_were_hashed_are_unpickled(filled, monkeypatch):
    """The file is opened once, so it cannot change between the two."""
    opened: list[str] = []
    real, real_open = os.open, open
    monkeypatch.setattr(os, "open", lambda path, *rest: (opened.append(Path(path).name), real(path, *rest))[1])
    monkeypatch.setattr("builtins.open", lambda *how, opener: real_open(*how, opener=opener))  # os.open, or it fails
    cifar10.read(filled)
    assert sorted(opened) == sorted(cifar10.ARCHIVE.files)


@full_size
def test_the_remedy_works(fake, serve, filled):
    """The command in the message repairs the folder."""
    path = filled / cifar10.ARCHIVE.folder / "data_batch_3"
    path.write_bytes(b"")
    address = serve({"/a": fake[1]}) + "/a"
    with pytest.raises(DataError) as refused:
        cifar10.load(filled, address)
    path.rename(re.search(r"move it to (\S+) and run the command again", str(refused.value))[1])
    cifar10.load(filled, address)
    assert listing(filled) == SEVEN


# With DVC: a copy of the project outside Git, its remote beside it as the real one lies.


@pytest.fixture
def project(tmp_path):
    if not REMOTE.exists():
        lacking(f"the DVC remote {REMOTE} is not there")
    copy = tmp_path / "project"
    for name in ("core", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / ".dvc").mkdir()
    for name in ("main.py", "data.dvc", ".dvc/config"):
        shutil.copy(ROOT / name, copy / name)
    remote = tmp_path / "shared" / "dvc-remote"
    for path in REMOTE.rglob("*"):
        if path.is_file():
            link = remote / path.relative_to(REMOTE)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return copy


def fetch_in(project, cwd=None):
    """Fetch there in a process of its own, with no network but loopback, from the current folder `cwd`."""
    program = (
        f"import sys; sys.path[0] = {str(project)!r}; from core.data import archive, cifar10\n"
        "try: cifar10.ARCHIVE.fetch(archive.ROOT / 'data')\n"
        "except archive.DataError as error: sys.exit(str(error))"
    )
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    env = {**os.environ, **proxies, "no_proxy": "", "NO_PROXY": "", "PYTHONPATH": ""}
    return subprocess.run((sys.executable, "-c", program), cwd=cwd or project, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_dvc_provides_the_data_in_a_copy_without_git(project):
    """Even where a fetch was killed before, which left a part of a file."""
    (project / "data" / cifar10.ARCHIVE.folder).mkdir(parents=True)
    (project / "data" / cifar10.ARCHIVE.folder / ".4ZLalXq.tmp").write_bytes(b"part of a file")
    done = fetch_in(project)
    assert (done.returncode, done.stderr) == (0, "")
    assert listing(project / "data") == SEVEN
    for name in cifar10.ARCHIVE.files:
        cifar10.ARCHIVE.verified(project / "data", name)
    assert (project / "data.dvc").read_text() == (ROOT / "data.dvc").read_text()


@pytest.mark.slow
def test_dvc_provides_the_data_from_another_folder_and_through_a_link(project):
    """As a scheduler or a notebook starts it, with the data on another disk."""
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    (project / "data").symlink_to(elsewhere)
    done = fetch_in(project, elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    assert (project / "data").is_symlink()
    assert listing(elsewhere) == SEVEN
    assert (project / "data.dvc").read_text() == (ROOT / "data.dvc").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stray", [False, True])
def test_dvc_tracks_files_from_a_mirror(project, data_dir, stray):
    """Without the remote, from an archive of the real files: `dvc status` is then clean, and `dvc push` has something
    to push. A folder with other files is not committed, since data.dvc does not name it."""
    shutil.rmtree(project.parent / "shared")
    archive = project.parent / "archive.tar"
    with tarfile.open(archive, "w") as tar:
        for name in cifar10.ARCHIVE.files:
            tar.add((data_dir / cifar10.ARCHIVE.folder / name).resolve(), f"{cifar10.ARCHIVE.folder}/{name}")
    if stray:
        (project / "data").mkdir()
        (project / "data" / "notes.txt").write_text("mine")
    program = f"""
import hashlib, pathlib
from core.data import archive, cifar10
packed = pathlib.Path({str(archive)!r})
md5 = hashlib.md5(packed.read_bytes()).hexdigest()
cifar10.ARCHIVE._replace(md5=md5, size=packed.stat().st_size).fetch(archive.ROOT / "data", packed.as_uri())
problem = archive._dvc(lambda repo: print(repo.status()))
assert problem is None, problem
"""
    done = subprocess.run((sys.executable, "-c", program), cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout == "{}\n") is not stray
    assert (project / "data.dvc").read_text() == (ROOT / "data.dvc").read_text()


@pytest.mark.slow
def test_files_of_a_tampered_remote_are_refused(project):
    """`verify = true` in .dvc/config: without it DVC hands over what it finds."""
    digest, _ = cifar10.ARCHIVE.files["batches.meta"]
    stored = project.parent / "shared" / "dvc-remote" / "files" / "md5" / digest[:2] / digest[2:]
    data = bytearray(stored.read_bytes())
    data[0] ^= 1
    stored.unlink()
    stored.write_bytes(data)
    done = fetch_in(project)
    assert done.returncode == 1
    assert "lacks the files of CIFAR-10" in done.stderr
    assert "DVC: " in done.stderr
    assert not (project / "data" / cifar10.ARCHIVE.folder / "batches.meta").exists()


@pytest.mark.slow
def test_no_network_and_no_remote(project):
    shutil.rmtree(project.parent / "shared")
    done = fetch_in(project)
    assert done.returncode == 1
    first, dvc, *_ = done.stderr.splitlines()
    assert first.endswith("lacks the files of CIFAR-10, and nothing delivered them:")
    assert dvc.startswith("  DVC: ")
    assert "\x1b" not in done.stderr
    assert "run the same command again, or `uv run dvc pull`." in done.stderr
    assert all(mirror in done.stderr for mirror in cifar10.ARCHIVE.addresses)
    assert "Traceback" not in done.stderr
