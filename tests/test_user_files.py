"""Files that a user names and the operating system does not let us read or write: one sentence, status 2, no traces."""

import contextlib
import ctypes
import errno
import fcntl
import os
import pwd
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import Timeout

from handpose import export, predict
from handpose.data import synthetic
from handpose.evaluation import __main__ as evaluation
from handpose.locks import hold_lock
from handpose.program import run_script
from handpose.report import __main__ as report
from handpose.sweep.audit import audit
from handpose.sweep.preflight.checks import check_sweep
from handpose.sweep.record.settings import LOCK, RaySettings
from tests import builders
from tests.builders import write_freihand
from tests.sweep.sweeps import make_settings
from train import main as train
from tune import exit_on_sweep_error

CAPABILITIES_V3 = 0x20080522
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
"""What lets root read and write in spite of a file's permissions: <linux/capability.h>, capabilities(7)."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a data set."""
    folder = tmp_path_factory.mktemp("user_files")
    write_freihand(folder / "data", num_poses=12, variants=1, num_test=3, size=64)
    return folder


@pytest.fixture
def here(place, monkeypatch) -> Iterator[Path]:
    """An empty working folder that the user may write."""
    folder = place / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.chdir(place)
    shutil.rmtree(folder)


@contextlib.contextmanager
def permissions_hold() -> Iterator[None]:
    """A file's permissions bind this thread and those that it starts, also for root.

    The user stays the same: another one could not read a virtual environment that root alone may enter.
    """
    if os.getuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0)  # version, this thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    if libc.capget(header, before) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    within = (ctypes.c_uint32 * 6)(*before)
    within[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
    if libc.capset(header, within) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        libc.capset(header, before)


@pytest.fixture
def sentence(here, place, monkeypatch, capsys):
    """What a program says on stderr before it leaves with 2, having left nothing in its folder."""

    def run(program: str, *arguments: object) -> str:
        given = [str(each) for each in arguments]
        before = set(here.rglob("*"))
        with permissions_hold(), pytest.raises(SystemExit) as left:
            start(program, given, monkeypatch)
        output = capsys.readouterr()
        assert left.value.code == 2, output.err
        lines = output.err.splitlines()
        assert len(lines) == 1, output.err
        assert lines[0].startswith("error: ")
        assert output.out == ""
        assert set(here.rglob("*")) == before
        return lines[0]

    def start(program: str, given: list[str], patch: pytest.MonkeyPatch) -> None:
        patch.setenv("DIR_SCRATCH", "outputs")
        root = [f"data.root={place / 'data'}"] * (not any(each.startswith("data.root=") for each in given))
        small = [*builders.SMALL, *root, "model.encoder.pretrained=false"]
        if program == "train":
            patch.setattr(sys, "argv", ["train.py", *small, *given])
            run_script("train", train)
        elif program == "tune":
            patch.setattr(
                sys, "argv", ["tune.py", *given] if "sweep.resume" in given[0] else ["tune.py", *small, *given]
            )
            run_script("tune", exit_on_sweep_error)
        elif program == "audit":
            patch.setattr(sys, "argv", ["audit", *given])
            audit.main()
        else:
            programs = {"evaluation": evaluation, "export": export, "predict": predict, "report": report}
            sys.exit((programs | {"synthetic": synthetic})[program].main(given))

    return run


def make_unreadable(folder: Path, name: str) -> tuple[Path, str]:
    file = folder / name
    file.write_text("x: 1")
    file.chmod(0)
    return file, "Permission denied|has no sweep|there is no"


def make_folder(folder: Path, name: str) -> tuple[Path, str]:
    (folder / name).mkdir()
    return folder / name, "[Ii]s a (directory|folder)|is not|has no sweep|there is no"


def make_broken_link(folder: Path, name: str) -> tuple[Path, str]:
    (folder / name).symlink_to(folder / "nowhere")
    return folder / name, "no such file|there is no|does not exist|has no sweep"


def make_below_a_file(folder: Path, name: str) -> tuple[Path, str]:
    (folder / "file").write_text("")
    return folder / "file" / name, "Not a directory|does not exist|has no sweep|there is no"


def make_in_a_locked_folder(folder: Path, name: str) -> tuple[Path, str]:
    (folder / "locked").mkdir()
    (folder / "locked" / name).write_text("")
    (folder / "locked").chmod(0)
    return folder / "locked" / name, "Permission denied"


def make_long_name(folder: Path, name: str) -> tuple[Path, str]:
    return folder / ("n" * 300 + name), "File name too long"


def make_empty(folder: Path, name: str) -> tuple[Path, str]:
    (folder / name).write_bytes(b"")
    return folder / name, "is not|does not hold|does not fit|must|has no sweep|there is no"


def make_latin_1(folder: Path, name: str) -> tuple[Path, str]:
    (folder / name).write_bytes("# Größe\nx: 1\n".encode("latin-1"))
    return folder / name, "line 1 is not UTF-8|is not|does not hold|does not fit|codec|has no sweep|there is no"


WRONG_FILES = [
    make_unreadable,
    make_folder,
    make_broken_link,
    make_below_a_file,
    make_in_a_locked_folder,
    make_long_name,
    make_empty,
    make_latin_1,
]
READ = {
    "best": ("train", "best={}", "best.yaml"),
    "checkpoint": ("train", "model.checkpoint_path={}", "last.ckpt"),
    "weights": ("train", "model.weights={}", "last.ckpt"),
    "encoder weights": ("train", "model.encoder.weights={}", "weights.pth"),
    "evaluated checkpoint": ("evaluation", "--checkpoint={}", "last.ckpt"),
    "predictions": ("evaluation", "--predictions={}", "test_preds.json.gz"),
    "official predictions": ("evaluation", "--predictions={}", "pred.zip"),
    "plain predictions": ("evaluation", "--predictions={}", "pred.json"),
    "exported": ("export", "--output=a.onnx --checkpoint={}", "last.ckpt"),
    "predicting": ("predict", "PHOTOGRAPH --checkpoint={}", "last.ckpt"),
    "reported": ("report", "{}", "sweep"),
    "audited": ("audit", "{}", "sweep"),
    "space": ("tune", "search_space={}", "space.yaml"),
    "space in Python": ("tune", "search_space={}", "space.py"),
    "resumed": ("tune", "sweep.resume={}", "sweep"),
    "shown": ("tune", "sweep.status={}", "sweep"),
}
IN_EVERY_WAY = ("best", "checkpoint", "encoder weights", "official predictions", "reported", "space")


@pytest.mark.parametrize(
    ("what", "make"),
    [(what, make) for what in READ for make in (WRONG_FILES if what in IN_EVERY_WAY else WRONG_FILES[:2])],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(sentence, here, place, what, make):
    program, arguments, name = READ[what]
    file, reason = make(here, name)
    arguments = arguments.format(file).replace("PHOTOGRAPH", str(place / "data/evaluation/rgb/00000000.jpg"))
    said = sentence(program, *arguments.split())
    assert str(file) in said or str(here / "nowhere") in said  # where a link leads
    assert re.search(reason, said)


def unreadable_labels(root: Path) -> Path:
    (root / "training_K.json").chmod(0)
    return root / "training_K.json"


def unreadable_pictures(root: Path) -> Path:
    (root / "training/rgb").chmod(0)
    return root / "training/rgb"


def unreadable_picture(root: Path) -> Path:
    (root / "training/rgb/00000003.jpg").chmod(0)
    return root / "training/rgb/00000003.jpg"


def unreadable_root(root: Path) -> Path:
    root.chmod(0)
    return root


def folder_for_a_picture(root: Path) -> Path:
    file = root / "training/rgb/00000003.jpg"
    file.unlink()
    file.mkdir()
    return file


def folder_for_labels(root: Path) -> Path:
    (root / "training_xyz.json").unlink()
    (root / "training_xyz.json").mkdir()
    return root / "training_xyz.json"


@pytest.mark.parametrize(
    "damage",
    [
        unreadable_labels,
        unreadable_pictures,
        unreadable_picture,
        unreadable_root,
        folder_for_a_picture,
        folder_for_labels,
    ],
)
def test_a_data_set_that_cannot_be_read_is_named_with_the_reason(sentence, here, place, damage):
    root = here / "set"
    shutil.copytree(place / "data", root)
    file = damage(root)
    packed = place / "packed"
    packed.mkdir(exist_ok=True)
    said = sentence("train", f"data.root={root}", f"paths.packed={packed}")
    assert str(file) in said
    assert re.search("Permission denied|Is a directory", said)


def read_only(folder: Path) -> tuple[Path, str]:
    (folder / "out").mkdir()
    (folder / "out").chmod(0o555)
    return folder / "out", "Permission denied"


def file_in_the_way(folder: Path) -> tuple[Path, str]:
    (folder / "out").write_text("")
    return folder / "out", "Not a directory"


def broken_link(folder: Path) -> tuple[Path, str]:
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out", "Not a directory"


def long_name(folder: Path) -> tuple[Path, str]:
    return folder / ("n" * 300), "File name too long"


def below_a_read_only_folder(folder: Path) -> tuple[Path, str]:
    return read_only(folder)[0] / "new" / "folder", "Permission denied"


@pytest.mark.parametrize(
    ("make", "program", "arguments"),
    [
        (read_only, "train", "paths.output={}"),
        (file_in_the_way, "train", "paths.output={}"),
        (broken_link, "train", "paths.output={}"),
        (long_name, "train", "paths.output={}"),
        (below_a_read_only_folder, "train", "paths.output={}"),
        (read_only, "train", "paths.packed={}"),
        (long_name, "train", "paths.packed={}"),
        (read_only, "train", "paths.logs={}/log"),
        (read_only, "train", "data=synthetic data.root={} data.source.num_train=4 data.source.num_eval=1"),
        (file_in_the_way, "train", "data=synthetic data.root={} data.source.num_train=4 data.source.num_eval=1"),
        (read_only, "evaluation", "--checkpoint=CHECKPOINT --output={}"),
        (file_in_the_way, "evaluation", "--checkpoint=CHECKPOINT --output={}"),
        (read_only, "export", "--checkpoint=CHECKPOINT --output={}/a.onnx"),
        (broken_link, "export", "--checkpoint=CHECKPOINT --output={}/a.onnx"),
        (read_only, "predict", "PHOTOGRAPH --checkpoint=CHECKPOINT --output={}"),
        (file_in_the_way, "predict", "PHOTOGRAPH --checkpoint=CHECKPOINT --output={}"),
        (read_only, "synthetic", "--num=1 --image-size=32 --sheet={}/sheet.png"),
        (file_in_the_way, "synthetic", "--num=1 --image-size=32 --sheet={}/sheet.png"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_before_work_starts(
    sentence, here, place, checkpoint, make, program, arguments
):
    folder, reason = make(here)
    if not (place / "last.ckpt").exists():
        shutil.copyfile(checkpoint, place / "last.ckpt")
    files = {"CHECKPOINT": place / "last.ckpt", "PHOTOGRAPH": place / "data/evaluation/rgb/00000000.jpg"}
    for name, file in files.items():
        arguments = arguments.replace(name, str(file))
    said = sentence(program, *(each.format(folder) for each in arguments.split()))
    assert str(folder) in said
    assert reason in said


@pytest.fixture
def without_ray(monkeypatch) -> None:
    def started(*_: object, **__: object) -> None:
        pytest.fail("Ray was started")

    monkeypatch.setattr("ray.init", started)


@pytest.mark.parametrize("make", [read_only, file_in_the_way, long_name])
def test_a_sweep_whose_folder_cannot_be_made_ends_before_ray_is_started(sentence, here, without_ray, make):
    folder, reason = make(here)
    said = sentence("tune", f"paths.output={folder}")
    assert str(folder) in said
    assert reason in said


def refuse_locks(number: int, patch: pytest.MonkeyPatch) -> None:
    """A network file system whose server locks no files."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_before_ray_is_started(sentence, here, without_ray, monkeypatch, number):
    refuse_locks(number, monkeypatch)
    said = sentence("tune", "sweep.name=first", "paths.output=results")
    assert f"the sweep cannot be kept in {here / 'results/sweeps/first'}" in said
    assert os.strerror(number) in said
    assert "DIR_SCRATCH" in said


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_data_on_a_file_system_without_locks_are_not_packed(sentence, here, monkeypatch, number):
    refuse_locks(number, monkeypatch)
    said = sentence("train", f"paths.packed={here / 'new/packed'}")
    assert str(here / "new/packed") in said
    assert os.strerror(number) in said


def test_a_file_system_without_symbolic_links_is_named_before_ray_is_started(sentence, here, without_ray, monkeypatch):
    def symlink(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", symlink)
    assert "Operation not permitted" in sentence("tune", "paths.output=results")


def test_a_sweep_that_has_only_been_locked_leaves_its_name_free(tmp_path):
    sweep = make_settings(tmp_path)
    (sweep.path / LOCK).touch()
    check_sweep(sweep, RaySettings(address=None, num_cpus=4))


def test_the_lock_of_a_running_sweep_is_told_apart_from_a_lock_that_cannot_be_had(tmp_path, monkeypatch):
    with hold_lock(tmp_path / "new" / LOCK):
        with pytest.raises(Timeout), hold_lock(tmp_path / "new" / LOCK):
            pass
        assert (tmp_path / "new" / LOCK).exists()
    refuse_locks(errno.ENOLCK, monkeypatch)
    with pytest.raises(OSError, match="No locks available") as raised, hold_lock(tmp_path / "other/sweep" / LOCK):
        pass
    assert raised.value.filename == str(tmp_path / "other/sweep" / LOCK)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("make", [make_unreadable, make_folder])
def test_an_env_file_that_cannot_be_read_is_named(sentence, here, make):
    file, _ = make(here, ".env")
    if file.is_dir():  # is no .env file
        return
    assert f"{file} cannot be read" in sentence("train")


def test_without_a_home_folder_a_path_that_needs_it_is_refused(sentence, monkeypatch):
    """A user without an entry in the list of users, as in a container that is started with --user."""

    def getpwuid(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    assert "~/data: the home folder cannot be found" in sentence("train", "data.root='~/data'")
    assert "~nobody-here/x.yaml: the home folder cannot be found" in sentence("train", "best='~nobody-here/x.yaml'")


def test_a_working_folder_that_is_gone_is_said(place, monkeypatch, capsys):
    gone = place / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    try:
        with pytest.raises(SystemExit) as left:
            run_script("train", train)
    finally:
        os.chdir(place)
    assert left.value.code == 2
    assert "error: the working folder no longer exists" in capsys.readouterr().err
