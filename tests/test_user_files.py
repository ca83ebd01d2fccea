"""Files that a user names and the operating system does not let us read or write: one sentence, status 2, no traces."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from handpose import export, predict
from handpose.config import compose, script
from handpose.data import synthetic
from handpose.data.pack import pack
from handpose.evaluation import __main__ as evaluation
from handpose.report import __main__ as report
from handpose.sweep import audit
from handpose.training.fit import prepare
from tests import builders
from tests.builders import write_freihand
from train import main as train

NOBODY = 54321
"""A user without an entry in the list of users, as in a container that is started with --user."""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that everybody can enter, unlike pytest's own, with a data set."""
    folder = Path(tempfile.mkdtemp(prefix="user-files-", dir=tempfile.gettempdir()))
    folder.chmod(0o755)
    write_freihand(folder / "data", num_poses=12, variants=1, num_test=3, size=64)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def here(place, monkeypatch) -> Iterator[Path]:
    """An empty working folder that the user may write."""
    folder = place / "here"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.chdir(place)
    shutil.rmtree(folder)


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions hold within the block, which they do not for root."""
    if os.getuid() != 0:
        yield
        return
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


@pytest.fixture
def sentence(here, place, monkeypatch, capsys):
    """What a program says on stderr before it leaves with 2, having left nothing in its folder."""

    def run(program: str, *arguments: object) -> str:
        given = [str(each) for each in arguments]
        before = set(here.rglob("*"))
        with ordinary_user(), pytest.raises(SystemExit) as left:
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
        if program == "train":
            defaults = [f"data.root={place / 'data'}"] * (not any(each.startswith("data.root=") for each in given))
            patch.setattr(sys, "argv", ["train.py", *builders.SMALL, *defaults, "model.encoder.pretrained=false", *given])
            script("train", train)
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
    return file, "Permission denied|holds no sweep"


def make_folder(folder: Path, name: str) -> tuple[Path, str]:
    (folder / name).mkdir()
    return folder / name, "Is a directory|is not|holds no sweep"


def make_broken_link(folder: Path, name: str) -> tuple[Path, str]:
    (folder / name).symlink_to(folder / "nowhere")
    return folder / name, "no such file|there is no file|does not exist|holds no sweep"


def make_below_a_file(folder: Path, name: str) -> tuple[Path, str]:
    (folder / "file").write_text("")
    return folder / "file" / name, "Not a directory|does not exist|holds no sweep"


def make_in_a_locked_folder(folder: Path, name: str) -> tuple[Path, str]:
    (folder / "locked").mkdir()
    (folder / "locked" / name).write_text("")
    (folder / "locked").chmod(0)
    return folder / "locked" / name, "Permission denied"


def make_long_name(folder: Path, name: str) -> tuple[Path, str]:
    return folder / ("n" * 300 + name), "File name too long"


def make_empty(folder: Path, name: str) -> tuple[Path, str]:
    (folder / name).write_bytes(b"")
    return folder / name, "is not|does not hold|does not fit|holds no sweep"


def make_latin_1(folder: Path, name: str) -> tuple[Path, str]:
    (folder / name).write_bytes("# Größe\nx: 1\n".encode("latin-1"))
    return folder / name, "line 1 is not UTF-8|is not|does not hold|does not fit|holds no sweep"


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
READ = [
    ("train", "best={}", "best.yaml"),
    ("train", "model.checkpoint_path={}", "last.ckpt"),
    ("train", "model.weights={}", "last.ckpt"),
    ("train", "model.encoder.weights={}", "weights.pth"),
    ("evaluation", "--checkpoint={}", "last.ckpt"),
    ("evaluation", "--predictions={}", "test_preds.json.gz"),
    ("evaluation", "--predictions={}", "pred.zip"),
    ("evaluation", "--predictions={}", "pred.json"),
    ("export", "--output=a.onnx --checkpoint={}", "last.ckpt"),
    ("predict", "PHOTOGRAPH --checkpoint={}", "last.ckpt"),
    ("report", "{}", "sweep"),
    ("audit", "{}", "sweep"),
]


@pytest.mark.parametrize("make", WRONG_FILES)
@pytest.mark.parametrize(("program", "arguments", "name"), READ, ids=lambda each: str(each).split("{")[0])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(sentence, here, place, make, program, arguments, name):
    file, reason = make(here, name)
    photograph = place / "data/evaluation/rgb/00000000.jpg"
    said = sentence(program, *(each.format(file).replace("PHOTOGRAPH", str(photograph)) for each in arguments.split()))
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
    packed.chmod(0o777)
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


@pytest.mark.parametrize("make", [read_only, file_in_the_way, broken_link, long_name, below_a_read_only_folder])
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("train", "paths.output={}"),
        ("train", "paths.packed={}"),
        ("train", "paths.logs={}/log"),
        ("train", "data=synthetic data.root={} data.num_train=4 data.num_eval=1"),
        ("evaluation", "--checkpoint=CHECKPOINT --output={}"),
        ("export", "--checkpoint=CHECKPOINT --output={}/a.onnx"),
        ("predict", "PHOTOGRAPH --checkpoint=CHECKPOINT --output={}"),
        ("synthetic", "--num=1 --image-size=32 --sheet={}/sheet.png"),
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
