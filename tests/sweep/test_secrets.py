"""Finds secrets of the environment in files and in what others see of processes, for tests/sweep/test_whole_run.py."""

import contextlib
import gzip
import io
import os
import zipfile
from pathlib import Path

SECRETS = {
    "WANDB_API_KEY": "planted-wandb-0123456789",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-0123456789",
    "HTTPS_PROXY": "http://me:planted-proxy-0123456789@127.0.0.1:9",
    "STUDY_URL": "planted-study-0123456789",
}
PLANTED = b"planted-"


def has_secret(content: bytes) -> bool:
    """Whether a secret is in it, also where it is packed; what is half-written is looked at as it is."""
    if PLANTED in content:
        return True
    with contextlib.suppress(zipfile.BadZipFile, EOFError, gzip.BadGzipFile):
        if content.startswith(b"\x1f\x8b"):
            return has_secret(gzip.decompress(content))
        if content.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                return any(has_secret(packed.read(name)) for name in packed.namelist())
    return False


def list_files_with_secrets(folder: Path) -> set[str]:
    """Files of a folder that have a secret; those that go away meanwhile have none."""
    found = set()
    for place, _, names in os.walk(folder):  # it passes over folders that go away
        for file in (Path(place) / name for name in names):
            with contextlib.suppress(OSError):
                if file.is_file() and not file.is_symlink() and has_secret(file.read_bytes()):
                    found.add(str(file))
    return found


def list_processes_with_secrets() -> set[str]:
    """Argument lists that have one."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found |= {str(file)} if PLANTED in file.read_bytes() else set()
    return found


def test_the_search_finds_a_secret_wherever_it_is_packed(tmp_path):
    (tmp_path / "plain").write_bytes(b"a planted-b c")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(b"a planted-b c"))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("inner", b"a planted-b c")
    (tmp_path / "clean").write_bytes(b"nothing")
    assert {Path(file).name for file in list_files_with_secrets(tmp_path)} == {"plain", "packed.gz", "packed.zip"}
