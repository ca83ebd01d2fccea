"""Files in an object store, or in anything else that pyarrow opens by URL: s3://, gs://, abfs://, hdfs://, file://.

Each process that opens the store, the driver and the workers on every node, takes the credentials from where the
store's own library looks for them. For S3 these are AWS_ACCESS_KEY_ID and related variables, ~/.aws, or the role of the
machine; AWS_ENDPOINT_URL selects an S3-compatible store other than Amazon's. URLs must not contain credentials, because
URLs are saved to files.
"""

import contextlib
import re
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import pyarrow
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from handpose.errors import UserError, join_lines
from handpose.files import stays_inside, write_atomically
from handpose.urls import hide_secrets, join_url

_ATOMIC_FILE_SYSTEMS = ("s3", "gcs", "abfs")
"""File systems on which a file appears only when it is closed. On others, a temporary file is moved to its name."""

_CHUNK_BYTES = 2**22


class StoredFile(NamedTuple):
    """A file in a store.

    Attributes:
        size_bytes: its size.
        modified_s: time of the last change by the store's clock, in seconds since 1970.
    """

    size_bytes: int
    modified_s: float


class ObjectStore:
    """A folder in an object store.

    Names of files are relative to the folder, with slashes. All methods raise OSError when an operation fails,
    FileNotFoundError when a file does not exist, and UserError when a name, given or listed, leaves the folder.

    Args:
        url: URL of the folder.

    Raises:
        UserError: the URL cannot be opened or contains a secret.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._files, self._root = _open_file_system(url)

    def __str__(self) -> str:
        return self.url

    def open_subfolder(self, name: str) -> "ObjectStore":
        """Open a subfolder."""
        self._check_name(name)
        return ObjectStore(join_url(self.url, name))

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a file, or its first `max_bytes`."""
        with _convert_arrow_errors(), self._files.open_input_stream(self._get_path(name)) as stream:
            return bytes(stream.read(max_bytes))

    def write(self, name: str, content: bytes) -> None:
        """Write a file. Concurrent readers see either the old or the new content."""
        with self._open_for_writing(name) as stream:
            stream.write(content)

    def upload(self, file: Path, name: str) -> None:
        """Upload a local file. Readers see either the old or the new content, also if the local file cannot be read."""
        with file.open("rb") as source:
            chunk, following = source.read(_CHUNK_BYTES), source.read(_CHUNK_BYTES)
            if not following:
                self.write(name, chunk)
                return
            with self._open_for_writing(name, can_fail=True) as stream:
                while chunk:
                    stream.write(chunk)
                    chunk, following = following, source.read(_CHUNK_BYTES)

    def download(self, name: str, file: Path) -> None:
        """Download a file. The local file appears only when it is complete."""
        with (
            _convert_arrow_errors(),
            self._files.open_input_stream(self._get_path(name)) as stream,
            write_atomically(file) as part,
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
        """Remove a file if it exists."""
        try:
            with _convert_arrow_errors():
                self._files.delete_file(self._get_path(name))
        except FileNotFoundError:
            return

    def list_files(self, folder: str = "") -> dict[str, StoredFile]:
        """List all files in a folder and its subfolders.

        Args:
            folder: name of the folder; empty for all files.

        Returns:
            Name of the file -> its size and time. Empty if the folder does not exist.
        """
        place = self._get_path(folder).rstrip("/")
        with _convert_arrow_errors():
            found: list[FileInfo] = self._files.get_file_info(FileSelector(place, recursive=True, allow_not_found=True))
        files = {
            each.path.removeprefix(self._root).lstrip("/"): StoredFile(each.size, (each.mtime_ns or 0) / 1e9)
            for each in found
            if each.type == FileType.File
        }
        for name in files:
            self._check_name(name)
        return files

    def check(self) -> None:
        """Check the access to the store: write a file, read it back and remove it.

        Raises:
            UserError: one of these failed, or the content was not the same.
        """
        name, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        try:
            self.write(name, content)
            is_same = self.read(name) == content
            self.remove(name)
        except OSError as error:
            raise UserError(
                f"sweep.storage={self.url} cannot be written and read ({summarise_store_error(error)}); "
                "give an existing bucket or "
                "folder, and credentials in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from error
        if not is_same:
            raise UserError(f"sweep.storage={self.url} returns other data than was written")

    def _check_name(self, name: str) -> None:
        if not stays_inside(name):
            raise UserError(
                f"{self} has a file {name!r}, whose name leads out of the folder; whoever can write there may want to "
                "overwrite files of yours: remove that file, or use another store"
            )

    def _get_path(self, name: str) -> str:
        self._check_name(name)
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _open_for_writing(self, name: str, *, can_fail: bool = False) -> Iterator[pyarrow.NativeFile]:
        """Yield a stream for the content of a file, which gets its name when the block ends without an exception.

        Args:
            name: name of the file.
            can_fail: whether the block can fail between two writes. A store keeps what has been written when the stream
                is closed, and pyarrow (26) cannot abort a stream. So the content gets another name first.
        """
        path = self._get_path(name)
        folder, _, last = path.rpartition("/")
        is_direct = self._files.type_name in _ATOMIC_FILE_SYSTEMS and not can_fail
        part = path if is_direct else f"{folder}/.{last}.{uuid.uuid4().hex[:8]}.part"
        with _convert_arrow_errors():
            self._make_folder(name)
            try:
                with self._files.open_output_stream(part) as stream:
                    yield stream
                if not is_direct:
                    self._files.move(part, path)
            except BaseException:
                if not is_direct:
                    with contextlib.suppress(OSError, pyarrow.ArrowException):
                        self._files.delete_file(part)
                raise

    def _make_folder(self, name: str) -> None:
        if self._files.type_name not in _ATOMIC_FILE_SYSTEMS:  # the atomic ones do not need folders
            self._files.create_dir(self._get_path(name).rpartition("/")[0], recursive=True)


def summarise_store_error(error: BaseException) -> str:
    """Summarise an error of a store in one line, without the request ID."""
    return re.sub(
        r"^When .*?: (?=AWS Error)|; Details: .*| ?\(Request ID: [^)]*\)|\. Detail: .*", "", join_lines(error)
    )


def check_url_secrets(url: str) -> None:
    """Raise UserError if the URL of a store contains a secret."""
    if hide_secrets(url) != url:
        raise UserError(
            f"sweep.storage={hide_secrets(url)} contains a secret, which would be stored in files; give it in the "
            "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


@lru_cache(maxsize=64)
def _open_file_system(url: str) -> tuple[FileSystem, str]:
    """Return pyarrow's file system and the path in it.

    Opening makes no network request, except for the region of an Amazon S3 bucket.
    """
    check_url_secrets(url)
    parts = urlsplit(url)
    try:
        # By default pyarrow 26 retries requests to Google Cloud Storage for 15 minutes.
        query = "retry_limit_seconds=20" if parts.scheme in ("gs", "gcs") and not parts.query else parts.query
        files, path = FileSystem.from_uri(urlunsplit(parts._replace(query=query)))
    except (pyarrow.ArrowException, OSError, ValueError, ImportError) as error:
        raise UserError(
            f"sweep.storage={url} cannot be opened ({summarise_store_error(error)}); give a URL such as "
            f"s3://bucket/folder, gs://bucket/folder or file:///folder"
        ) from error
    return files, path.rstrip("/")


@contextlib.contextmanager
def _convert_arrow_errors() -> Iterator[None]:
    """Convert pyarrow's exceptions that are not OSErrors to OSError."""
    try:
        yield
    except pyarrow.ArrowException as error:
        if isinstance(error, OSError):
            raise
        raise OSError(summarise_store_error(error)) from error
