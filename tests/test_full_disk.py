"""What a full disk does to every program: a sentence with the file, the space that is left and a remedy, no half files.

The disk is a small tmpfs, which only root can mount.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from handpose.data import pack as packing
from handpose.data import synthetic
from handpose.data.sample import Annotations, ImageFiles
from handpose.errors import UserError, explain_file_error, format_size
from handpose.evaluation.submission import write_course, write_official
from handpose.files import check_writable, write_atomically, write_json
from handpose.program import run_script
from handpose.report.trial_table import TrialTable
from handpose.sweep.record.events import EventLog, SweepOpened, TrialSuggested, read_events
from handpose.training.checkpoints import AtomicCheckpointIO
from handpose.yaml_files import write_yaml
from tests import builders
from tests.builders import make_hands, write_freihand
from tests.data.test_synthetic import PARAMETERS
from train import main as train

SENTENCE = r"cannot be written \(No space left on device: [\d.]+ [kM]B free are not enough\); "


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("num_values", [30_000, 300_000])
def test_a_checkpoint_that_does_not_fit_is_named(disk, num_values):
    folder = disk(2**20, free=2**16)
    with pytest.raises(UserError, match=rf"the checkpoint {folder}/run/last.ckpt {SENTENCE}free some space"):
        AtomicCheckpointIO(is_durable=True).save_checkpoint(
            {"weights": torch.zeros(num_values)}, folder / "run/last.ckpt"
        )
    assert list_files(folder) == ["other"]


def test_predictions_that_do_not_fit_are_named_and_the_ones_before_stay(disk):
    folder = disk(2**20, free=2**17)
    for write, name in ((write_course, "test_preds.json.gz"), (write_official, "pred.zip")):
        write(folder / name, make_hands(4))
        before = (folder / name).read_bytes()
        with pytest.raises(OSError, match="No space left") as raised:
            write(folder / name, make_hands(4000))
        assert raised.value.filename == str(folder / name)
        assert (folder / name).read_bytes() == before
    assert list_files(folder) == ["other", "pred.zip", "test_preds.json.gz"]


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_json(file, ["x" * 10] * 20_000),
        lambda file: write_yaml(file, {"x": "y" * 200_000}),
        lambda file: TrialTable("m", "min", 1, 1, rows={}).write_csv(file),
    ],
    ids=["json", "yaml", "csv"],
)
def test_a_file_that_does_not_fit_is_named_and_the_one_before_stays(disk, write):
    folder = disk(2**20, free=0)
    file = folder / "file"
    file.touch()
    with pytest.raises(OSError, match="No space left") as raised:
        write(file)
    assert raised.value.filename == str(file)
    assert list_files(folder) == ["file", "other"]
    assert file.read_bytes() == b""


def test_an_event_that_does_not_fit_is_not_in_the_log(disk):
    folder = disk(2**20, free=2**13)
    log = EventLog(folder / "sweep/events.jsonl")
    written = [SweepOpened(at=0.0, num_trials=1000)]
    log.append(written[0])

    def fill() -> None:
        for trial in range(1000):
            log.append(TrialSuggested(at=0.0, trial=trial, params={"optimizer.lr": 0.1}))
            written.append(TrialSuggested(at=0.0, trial=trial, params={"optimizer.lr": 0.1}))

    with pytest.raises(UserError, match=rf"{folder}/sweep/events.jsonl {SENTENCE}"):
        fill()
    assert len(written) > 10
    assert read_events(log.path) == written
    event = TrialSuggested(at=0.0, trial=1000, params={})
    (folder / "other").unlink()
    log.append(event)
    log.close()
    assert read_events(log.path) == [*written, event]


def test_images_that_do_not_fit_are_not_packed(disk, tmp_path, monkeypatch):
    folder = disk(2**20, free=2**16)
    builders.write_images(tmp_path / "rgb", 40)
    files = ImageFiles.from_paths(sorted((tmp_path / "rgb").iterdir()))
    annotations = Annotations(files, builders.make_cameras(40), make_hands(40), scale_m=None, pose=np.arange(40))
    with pytest.raises(UserError, match=r"needs 123 kB but .* has [\d.]+ kB free; set paths.packed"):
        packing.pack(annotations, image_size=None, folder=folder / "packed", progress=False)
    monkeypatch.setattr(packing, "_check_space", lambda *_: None)  # another program fills the disk meanwhile
    with pytest.raises(
        UserError, match=rf"images cannot be packed in {folder}/packed because .* {SENTENCE}set paths.packed"
    ):
        packing.pack(annotations, image_size=None, folder=folder / "packed", progress=False)
    assert [path.suffix for path in (folder / "packed").iterdir()] == [".lock"]


def test_hands_that_do_not_fit_are_not_drawn(disk, monkeypatch, capfd):
    folder = disk(2**17, free=2**14)
    hands_of = synthetic.Synthetic(str(folder / "hands"), **PARAMETERS)
    with pytest.raises(UserError, match=r"needs up to [\d.]+ [kM]B, but data.root=.* has [\d.]+ kB free"):
        hands_of.generate()
    monkeypatch.setattr(synthetic, "_check_space", lambda *_: None)
    with pytest.raises(UserError, match=rf"data.root={folder}/hands because .*\.jpg {SENTENCE}choose another folder"):
        hands_of.generate()
    assert [path.suffix for path in (folder / "hands").iterdir()] == [".lock"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_disk_without_free_inodes_is_said_so(disk):
    folder = disk(2**20, options=",nr_inodes=4")
    for number in range(3):
        (folder / str(number)).touch()
    with pytest.raises(OSError, match="No space left") as raised:
        (folder / "3").touch()
    assert "0 more files (inodes) are not enough" in explain_file_error(raised.value)


def test_a_full_disk_cannot_be_written(disk):
    folder = disk(2**20, free=0)
    with pytest.raises(OSError, match="No space left") as raised:
        check_writable(folder / "new")
    assert str(folder) in explain_file_error(raised.value)
    assert list_files(folder) == ["other"]


def test_a_block_that_fails_for_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, write_atomically(tmp_path / "file"):
        (tmp_path / "nowhere").read_text()
    assert raised.value.filename == str(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 MB"), (34_000, "34 kB"), (3.4e6, "3.4 MB"), (7e7, "70 MB"), (9.96e9, "10 GB"), (69.4e9, "69 GB")],
)
def test_sizes_have_the_unit_that_fits(num_bytes, text):
    assert format_size(num_bytes) == text


@pytest.mark.parametrize("what", ["checkpoints", "log"])
def test_a_training_whose_disk_is_full_ends_with_one_sentence(disk, tmp_path, monkeypatch, capfd, what):
    """In the log TensorBoard writes in a thread of its own."""
    folder = disk(2**21 if what == "checkpoints" else 2**15)
    root = write_freihand(tmp_path / "set", num_poses=12, variants=1, num_test=3, size=64)
    place = {"checkpoints": f"paths.checkpoints={folder / 'c'}", "log": f"paths.logs={folder / 'log'}"}
    given = [*builders.SMALL, f"data.root={root}", f"paths.output={tmp_path / 'out'}", place[what]]
    network = ["model.encoder.name=test_efficientnet", "model.encoder.pretrained=false", "model.decoder.depth=2"]
    run = ["trainer.max_epochs=1", "data.batch_size=4", "num_threads=1", "logger=tensorboard"]
    monkeypatch.setattr(sys, "argv", ["train.py", *given, *network, *run])
    with pytest.raises(SystemExit) as left:
        run_script("train", train)
    error = capfd.readouterr().err
    assert left.value.code == 2, error
    assert "Traceback" not in error
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert str(folder) in sentences[0]
    assert "No space left on device" in sentences[0]
    assert not list(folder.rglob("*.ckpt"))
    assert not list(folder.rglob("*.part"))
