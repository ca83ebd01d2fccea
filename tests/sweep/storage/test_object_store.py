"""Files in a store, here on the disk: what is written is read again, and nothing that is secret gets into a URL."""

import contextlib
import errno
import random
import threading
from types import SimpleNamespace

import pytest
from pyarrow.fs import FileType

from handpose.errors import UserError
from handpose.sweep.storage.object_store import ObjectStore
from handpose.sweep.storage.stored_sweep import download_files
from handpose.urls import join_url, split_url


@pytest.fixture
def store(tmp_path):
    return ObjectStore(f"file://{tmp_path}/store")


def test_what_is_written_is_read_copied_listed_and_removed(store, tmp_path):
    (tmp_path / "file").write_bytes(b"checkpoint")
    store.write("a/b.txt", b"one")
    store.upload(tmp_path / "file", "a/c/d.ckpt")
    store.copy("a/c/d.ckpt", "e/f.ckpt")
    store.download("e/f.ckpt", tmp_path / "back" / "f.ckpt")
    assert store.read("a/b.txt") == b"one"
    assert (tmp_path / "back" / "f.ckpt").read_bytes() == b"checkpoint"
    assert {name: stored.size_bytes for name, stored in store.list_files().items()} == {
        "a/b.txt": 3,
        "a/c/d.ckpt": 10,
        "e/f.ckpt": 10,
    }
    assert set(store.list_files("a/c")) == {"a/c/d.ckpt"}
    assert set(store.open_subfolder("a").list_files()) == {"b.txt", "c/d.ckpt"}
    for _ in range(2):
        store.remove("a/c/d.ckpt")
    assert set(store.list_files("a")) == {"a/b.txt"}
    assert store.list_files("nowhere") == {}
    with pytest.raises(FileNotFoundError):
        store.read("a/c/d.ckpt")


def test_a_reader_never_sees_half_a_file(store):
    """On a file system a file is moved to its name, as a store's own files appear at once."""
    store.write("log", b"0" * 10)
    lengths, is_over = set(), threading.Event()

    def read():
        while not is_over.is_set():
            content = store.read("log")
            lengths.add((len(content), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    for digit in b"123456789" * 5:
        store.write("log", bytes([digit]) * 2_000_000)
    is_over.set()
    reader.join()
    assert lengths <= {(10, 1), (2_000_000, 1)}
    assert set(store.list_files()) == {"log"}


class FailingFile:
    """A local file on a disk that fails after some chunks."""

    def __init__(self, chunks):
        self.chunks = iter(chunks)

    def open(self, mode):
        return contextlib.nullcontext(self)

    def read(self, num_bytes):
        for chunk in self.chunks:
            return chunk
        raise OSError(errno.EIO, "Input/output error")


class DirectFiles:
    """A file system that says that its files appear only when they are closed, as those of S3 do."""

    type_name = "s3"

    def __init__(self, files):
        self._files = files

    def __getattr__(self, name):
        return getattr(self._files, name)


@pytest.mark.parametrize("is_direct", [False, True])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_a_read_error_during_an_upload_keeps_the_file_in_the_store(store, is_direct, num_chunks):
    store.write("best.yaml", b"good")
    if is_direct:
        store._files = DirectFiles(store._files)
    with pytest.raises(OSError, match="Input/output error"):
        store.upload(FailingFile([b"new"] * num_chunks), "best.yaml")
    assert store.read("best.yaml") == b"good"
    assert set(store.list_files()) == {"best.yaml"}


@pytest.mark.parametrize("num_bytes", [0, 1, 2**22, 2**22 + 1, 2**23 + 5])
def test_a_file_of_any_size_is_uploaded_whole(store, tmp_path, num_bytes):
    content = random.Random(num_bytes).randbytes(num_bytes)
    (tmp_path / "file").write_bytes(content)
    for files in (store._files, DirectFiles(store._files)):
        store._files = files
        store.upload(tmp_path / "file", "a/file")
        assert store.read("a/file") == content
        assert set(store.list_files()) == {"a/file"}


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("s4://bucket/folder", "sweep.storage=s4://bucket/folder cannot be opened"),
        ("folder", "sweep.storage=folder cannot be opened"),
        ("s3://KEY:hunter2@bucket/folder", "contains a secret"),
        ("s3://bucket/folder?secret_key=hunter2", "contains a secret"),
        ("abfs://bucket@account.dfs.core.windows.net/x?sas_token=hunter2", "contains a secret"),
    ],
)
def test_a_url_that_cannot_be_meant_is_a_sentence_without_its_secret(url, sentence):
    with pytest.raises(UserError, match=r"sweep\.storage=") as told:
        ObjectStore(url)
    assert sentence in str(told.value)
    assert "hunter2" not in str(told.value)


def test_a_store_that_cannot_be_written_is_told_before_work_starts(tmp_path):
    (tmp_path / "store").write_text("a file where the folder would be")
    with pytest.raises(UserError, match=r"sweep.storage=file://.*/store cannot be written and read"):
        ObjectStore(f"file://{tmp_path}/store").check()


OUTSIDE = ["../victim", "a/../../victim", "/tmp/victim", "..", "a/.."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_operation_leaves_the_folder(store, tmp_path, name):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "file").write_bytes(b"new")
    store.write("a/b.txt", b"one")
    for operation in (
        lambda: store.read(name),
        lambda: store.write(name, b"new"),
        lambda: store.upload(tmp_path / "file", name),
        lambda: store.download(name, tmp_path / "back"),
        lambda: store.copy("a/b.txt", name),
        lambda: store.copy(name, "a/c.txt"),
        lambda: store.remove(name),
        lambda: store.list_files(name),
        lambda: store.open_subfolder(name),
    ):
        with pytest.raises(UserError, match="leads out of the folder"):
            operation()
    assert (tmp_path / "victim").read_text() == "kept"
    assert set(store.list_files()) == {"a/b.txt"}
    assert not (tmp_path / "back").exists()


def test_a_store_that_lists_a_file_outside_its_folder_is_refused(store, tmp_path, monkeypatch):
    """Keys of an object store are any text, and whoever can write there chooses them."""
    found = SimpleNamespace(path=f"{store._root}/../../x", type=FileType.File, size=1, mtime_ns=0)
    listing = SimpleNamespace(get_file_info=lambda selector: [found], type_name="s3")
    monkeypatch.setattr(store, "_files", listing)
    with pytest.raises(UserError, match=r"has a file '\.\./\.\./x', whose name leads out of the folder"):
        store.list_files()
    with pytest.raises(UserError, match="leads out of the folder"):
        download_files(store, tmp_path / "sweep", is_wanted=lambda name: True)


def test_checking_leaves_nothing(store):
    store.check()
    assert store.list_files() == {}


def test_what_lies_below_a_url_stays_before_its_options():
    url = "s3://bucket/folder?region=eu-west-1"
    assert join_url(url, "name/confirm") == "s3://bucket/folder/name/confirm?region=eu-west-1"
    assert split_url(join_url(url, "name")) == (url, "name")
