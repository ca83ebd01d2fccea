"""Files in an object store, or on anything else that pyarrow opens by a URL: s3://, gs://, abfs://, hdfs://, file://.

Credentials come from where the store's own library looks for them (of s3 AWS_ACCESS_KEY_ID and its like, ~/.aws or the
machine's role; AWS_ENDPOINT_URL names a store that is not Amazon's), in each process that opens it: those of the driver
and those of the workers on every node. Nothing of them is in a URL, so that nothing of them is written down.
"""

import contextlib
import re
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import pyarrow
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from handpose.errors import UserError
from handpose.urls import join_url
from handpose.whole_file import whole_file

_ATOMIC_FILE_SYSTEMS = ("s3", "gcs", "abfs")
"""File systems on which a file is there when it has been closed, and not before. On others it is moved there."""

_CHUNK_BYTES = 2**22
_SECRET = re.compile("secret|token|key|password|signature|^sig$", re.IGNORECASE)


class StoredFile(NamedTuple):
    """A file in a store. modified_s: seconds since the epoch, by the store's clock."""

    size_bytes: int
    modified_s: float


class ObjectStore:
    """A folder in a store. Names are relative to it, with slashes.

    Whatever the store does not do is an OSError, FileNotFoundError where a file is not there. Raises UserError for a
    URL that cannot be meant.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, self._root = _open_file_system(url)

    def __str__(self) -> str:
        return self.url

    def open_subfolder(self, name: str) -> "ObjectStore":
        """A folder in it."""
        return ObjectStore(join_url(self.url, name))

    def read(self, name: str) -> bytes:
        with _convert_arrow_errors(), self._files.open_input_stream(self._get_path(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file; a reader finds the one before or this one."""
        with _convert_arrow_errors():
            path = self._begin_write(name)
            with self._files.open_output_stream(path) as stream:
                stream.write(content)
            self._finish_write(path, name)

    def upload(self, file: Path, name: str) -> None:
        """The same with what is in a file."""
        with _convert_arrow_errors(), file.open("rb") as source:
            path = self._begin_write(name)
            with self._files.open_output_stream(path) as stream:
                while chunk := source.read(_CHUNK_BYTES):
                    stream.write(chunk)
            self._finish_write(path, name)

    def download(self, name: str, file: Path) -> None:
        """Fetch a file, which appears when it is whole."""
        with (
            _convert_arrow_errors(),
            self._files.open_input_stream(self._get_path(name)) as stream,
            whole_file(file) as part,
            part.open("wb") as target,
        ):
            while chunk := stream.read(_CHUNK_BYTES):
                target.write(chunk)

    def copy(self, source: str, target: str) -> None:
        """Copy a file within the store."""
        with _convert_arrow_errors():
            self._make_folder(target)
            self._files.copy_file(self._get_path(source), self._get_path(target))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            with _convert_arrow_errors():
                self._files.delete_file(self._get_path(name))
        except FileNotFoundError:
            return

    def list_files(self, folder: str = "") -> dict[str, StoredFile]:
        """All files in a folder and below it: name -> what is known of it."""
        place = self._get_path(folder).rstrip("/")
        with _convert_arrow_errors():
            found: list[FileInfo] = self._files.get_file_info(FileSelector(place, recursive=True, allow_not_found=True))
        return {
            each.path.removeprefix(self._root).lstrip("/"): StoredFile(each.size, (each.mtime_ns or 0) / 1e9)
            for each in found
            if each.type == FileType.File
        }

    def check(self) -> None:
        """Write a file, read it back and remove it. Raises UserError where that cannot be done."""
        name, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        try:
            self.write(name, content)
            is_same = self.read(name) == content
            self.remove(name)
        except OSError as error:
            raise UserError(
                f"sweep.storage={self.url} cannot be written and read ({summarise_store_error(error)}); "
                "give a bucket or folder that "
                "is there, and credentials in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        if not is_same:
            raise UserError(f"sweep.storage={self.url} gives back something else than was written")

    def _get_path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _begin_write(self, name: str) -> str:
        """Where to write a file that is to have a name."""
        self._make_folder(name)
        path = self._get_path(name)
        if self._files.type_name in _ATOMIC_FILE_SYSTEMS:
            return path
        folder, _, last = path.rpartition("/")
        return f"{folder}/.{last}.{uuid.uuid4().hex[:8]}.part"

    def _finish_write(self, path: str, name: str) -> None:
        if path != self._get_path(name):
            self._files.move(path, self._get_path(name))

    def _make_folder(self, name: str) -> None:
        if self._files.type_name not in _ATOMIC_FILE_SYSTEMS:  # these have none
            self._files.create_dir(self._get_path(name).rpartition("/")[0], recursive=True)


def summarise_store_error(error: BaseException) -> str:
    """What a store says went wrong, in a line, without the number of the request."""
    text = " ".join(str(error).split())
    return re.sub(r"^When .*?: (?=AWS Error)|; Details: .*| ?\(Request ID: [^)]*\)|\. Detail: .*", "", text)


@lru_cache(maxsize=64)
def _open_file_system(url: str) -> tuple[FileSystem, str]:
    """pyarrow's file system and the path in it. Opening reaches for nothing but the region of a bucket of Amazon's."""
    parts = urlsplit(url)
    if parts.password or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query)):
        raise UserError(
            f"sweep.storage={_hide_secrets(url)} has a secret in it, which would be written down; give it in the "
            "environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    try:
        # Google's is asked again for a quarter of an hour otherwise (pyarrow 26).
        query = "retry_limit_seconds=20" if parts.scheme in ("gs", "gcs") and not parts.query else parts.query
        files, path = FileSystem.from_uri(urlunsplit(parts._replace(query=query)))
    except (pyarrow.ArrowException, OSError, ValueError, ImportError) as error:
        raise UserError(
            f"sweep.storage={url} cannot be opened ({summarise_store_error(error)}); give a URL as s3://bucket/folder, gs://bucket/"
            "folder or file:///folder"
        ) from error
    return files, path.rstrip("/")


def _hide_secrets(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"


@contextlib.contextmanager
def _convert_arrow_errors() -> Iterator[None]:
    """What pyarrow raises beside OSError as one."""
    try:
        yield
    except pyarrow.ArrowException as error:
        if isinstance(error, OSError):
            raise
        raise OSError(summarise_store_error(error)) from error
