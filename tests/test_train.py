"""`python train.py` as a user starts it, in a folder of his own: what it prints, what it leaves, how it goes on."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from handpose.evaluation.submission import read_course, read_official
from handpose.program import run_script
from tests.builders import write_course, write_freihand
from tests.test_utf8 import ASCII
from train import main

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = [
    "data.image_size=64",
    "model.encoder.name=test_efficientnet",
    "model.encoder.pretrained=false",
    "num_threads=1",
]
FREIHAND = [
    *SMALL,
    "data=freihand",
    "data.root=Hände",
    "data.batch_size=8",
    "data.source.val_fraction=0.25",
    "data.source.num_blocks=2",
]


def make_command(*arguments: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "train.py"), *arguments]


def make_environment(**variables: str) -> dict[str, str]:
    not_mine = ("MP_DATA", "DIR_SCRATCH", "PYTHONUTF8", "PYTHONIOENCODING")
    mine = {key: value for key, value in os.environ.items() if key not in not_mine}
    return mine | {"OMP_NUM_THREADS": "1"} | variables


def run_train(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        make_command(*arguments),
        cwd=folder,
        env=make_environment(**variables),
        capture_output=True,
        encoding="utf-8",
        timeout=200,
    )


@pytest.fixture
def train_here(monkeypatch, capsys):
    """Runs the program in the process of the tests, which has imported everything; returns what it printed."""

    def run(folder: Path, *arguments: str, **variables: str) -> str:
        monkeypatch.chdir(folder)
        for name in ("MP_DATA", "DIR_SCRATCH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        run_script("train", main)
        return capsys.readouterr().out

    return run


def find_one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


DATED = "[0-9]" * 4 + "-[0-9][0-9]" * 2 + "/" + "-".join(["[0-9][0-9]"] * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("Größe")
    write_freihand(folder / "Hände", num_poses=24, variants=1, num_test=6, size=64)
    return folder


@pytest.fixture(scope="module")
def trained(folder, latin_1_if_possible):
    """A training in a folder with an umlaut, in a locale that is not UTF-8."""
    variables = {"DIR_SCRATCH": "scratch"} | (latin_1_if_possible or ASCII)
    return run_train(folder, *FREIHAND, "trainer.max_epochs=2", **variables)


def test_a_run_tells_what_came_out_and_nothing_else(trained):
    assert trained.returncode == 0, trained.stderr
    figures = (
        r"PA-MPJPE \d+\.\d\d mm without reflection \(mean pose \d+\.\d\d, ratio \d+\.\d\d\), "
        r"root-relative at middle_mcp .* mm, .* px in images of 64 px, AUC 0\.\d+"
    )
    official = r"            to compare with papers: PA-MPJPE \d+\.\d\d mm, .* which allows a reflection"
    places = [r"checkpoint  .*/best-epoch.*\.ckpt", r"predictions .*/logs/preds/.*", r"log         .*/logs/runs/.*"]
    expected = [f"validation  {figures}", f"test        {figures}", official, *places]
    told = trained.stdout.splitlines()
    assert len(told) == len(expected), trained.stdout
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(expected, told, strict=True)), trained.stdout


def test_a_log_file_gets_a_line_an_epoch_and_no_word_of_the_libraries(trained):
    told = [re.sub(r"\d+\.\d+|\(\d+ s\)|(?<= )/\S+", "_", line) for line in trained.stderr.splitlines()]
    assert told == [
        "Packed 24 images of 64 px in _ in _ s",
        "Packed 6 images of 64 px in _ in _ s",
        "epoch 1/2: loss _, PA-MPJPE _ mm _",
        "epoch 2/2: loss _, PA-MPJPE _ mm _",
    ]


def test_a_run_leaves_dated_folders_under_the_scratch_folder(folder, trained):
    logs, checkpoints, predictions = (
        find_one(folder, f"scratch/logs/{name}/{DATED}") for name in ("runs", "ckpts", "preds")
    )
    assert logs.parts[-2:] == checkpoints.parts[-2:] == predictions.parts[-2:]
    assert {path.name for path in logs.iterdir()} == {"config.yaml", "tensorboard"}
    assert {path.name for path in predictions.iterdir()} == {
        "test_expected_errors.json.gz",
        "test_preds.json.gz",
        "pred.zip",
        "hands",
        "metrics.json",
    }
    assert {path.name for path in folder.iterdir()} == {"Hände", "scratch"}


def test_letters_that_the_locale_writes_otherwise_are_kept(folder, trained):
    config = find_one(folder, f"scratch/logs/runs/{DATED}/config.yaml")
    assert yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["root"] == str(folder / "Hände")
    assert f"predictions {folder}/scratch/logs/preds" in trained.stdout


def test_the_best_checkpoint_has_its_value_in_its_name(folder, trained):
    checkpoints = find_one(folder, f"scratch/logs/ckpts/{DATED}")
    best = find_one(checkpoints, "best-*.ckpt")
    assert {path.name for path in checkpoints.iterdir()} == {best.name, "last.ckpt"}
    epoch, value = re.fullmatch(r"best-epoch(\d{3})-pa_mpjpe_mm(\d+\.\d{3})\.ckpt", best.name).groups()
    assert f"epoch {int(epoch)}/2: loss" in trained.stderr
    line = next(line for line in trained.stderr.splitlines() if line.startswith(f"epoch {int(epoch)}/"))
    assert float(re.search(r"PA-MPJPE (\S+) mm", line)[1]) == pytest.approx(float(value), abs=0.006)
    assert (
        yaml.safe_load(find_one(folder, f"scratch/logs/runs/{DATED}/config.yaml").read_text())
        == (torch.load(best, weights_only=True)["config"])
    )


def test_both_submissions_hold_the_same_predictions(folder, trained):
    predictions = find_one(folder, f"scratch/logs/preds/{DATED}")
    course, official = read_course(predictions / "test_preds.json.gz"), read_official(predictions / "pred.zip")
    assert course.shape == (6, 21, 3)
    assert np.allclose(course, official, atol=1e-6)
    assert "test/pa_mpjpe_mm" in json.loads((predictions / "metrics.json").read_text())["metrics"]


def test_the_winner_of_a_sweep_is_trained_and_predicts_as_the_mean_over_views(folder, train_here):
    given = [item.replace("Hände", "'Hände'") for item in FREIHAND]  # as a sweep records it
    recorded = [*given, "model/decoder=effpose", "optimizer.lr=0.003"]
    (folder / "best.yaml").write_text(yaml.safe_dump({"overrides": recorded, "params": {}}))
    views = ["test_time=rotations_mirror", "test_time.num_rotations=2"]
    train_here(folder, "best=best.yaml", "trainer.max_epochs=1", "data.image_size=72", *views, DIR_SCRATCH="winner")
    config = yaml.safe_load(find_one(folder, f"winner/logs/runs/{DATED}/config.yaml").read_text())
    assert config["model"]["decoder"]["_target_"].endswith("EffPose")
    assert (config["optimizer"]["lr"], config["trainer"]["max_epochs"]) == (0.003, 1)
    metrics = json.loads(find_one(folder, f"winner/logs/preds/{DATED}/metrics.json").read_text())
    seen = {"num_rotations": 2, "rotation_deg": 20.0, "mirror": True, "scales": [1.0], "crop": None}
    assert metrics["test_time"] == seen


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A folder with the course's data set, which a .env file leads to."""
    folder = tmp_path_factory.mktemp("course")
    write_course(folder / "course_data", num_poses=2)
    (folder / ".env").write_text("MP_DATA=course_data\nDIR_SCRATCH='scratch'\n")
    return folder


def test_the_run_this_project_starts_from(course, train_here):
    """EfficientNet-B4 and the data set of the environment, which comes before the .env file's."""
    elsewhere = course.parent / "elsewhere"
    out = train_here(
        course,
        *["experiment=exp_submission", "model.encoder.pretrained=false", "data.image_size=64", "trainer.max_epochs=1"],
        *["data.batch_size=8", "num_threads=1"],
        MP_DATA=str(course / "course_data"),
        DIR_SCRATCH=str(elsewhere),
    )
    assert "test        predictions without errors, because this split has no joints" in out
    assert read_course(find_one(elsewhere, f"logs/preds/{DATED}/test_preds.json.gz")).shape == (8, 21, 3)
    config = yaml.safe_load(find_one(elsewhere, f"logs/runs/{DATED}/config.yaml").read_text())
    assert config["model"]["encoder"]["name"] == "efficientnet_b4"
    assert not (course / "scratch").exists()


@contextlib.contextmanager
def start_run(folder: Path, *arguments: str, until: str):
    """A run that has got as far as the file `until`; ended by its process id, if it has not ended by itself."""
    with open(folder / "stderr.txt", "w", encoding="utf-8") as stderr:
        process = subprocess.Popen(make_command(*arguments), cwd=folder, env=make_environment(), stderr=stderr)
    try:
        deadline = time.monotonic() + 120
        while not list(folder.glob(until)):
            assert process.poll() is None, (folder / "stderr.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_run_is_tested_while_it_goes_on_then_interrupted_and_resumed(course):
    submission = [*SMALL, "data.batch_size=8"]
    last = f"scratch/logs/ckpts/{DATED}/last.ckpt"
    with start_run(course, "experiment=exp_submission", *submission, "trainer.max_epochs=9999", until=last) as writer:
        checkpoint = f"+model.checkpoint_path={find_one(course, last)}"
        test = ["experiment=test_submission", checkpoint, *submission, "test=true"]
        tested = run_train(course, *test, DIR_SCRATCH="tested", MP_DATA="")  # empty is not set: the .env file's counts
        assert writer.poll() is None
        writer.send_signal(signal.SIGINT)
        assert writer.wait(60) == 130
    assert tested.returncode == 0, tested.stderr
    assert read_course(find_one(course, f"tested/logs/preds/{DATED}/test_preds.json.gz")).shape == (8, 21, 3)
    assert not list(course.glob(f"tested/logs/ckpts/{DATED}/*"))

    told = (course / "stderr.txt").read_text().splitlines()
    sentence = f"interrupted; to resume, give the same command and model.checkpoint_path={find_one(course, last)}"
    assert told[-1] == sentence
    assert not any("Traceback" in line for line in told)

    epochs = torch.load(find_one(course, last), weights_only=True)["epoch"] + 1
    target = f"trainer.max_epochs={epochs + 1}"
    resumed = run_train(course, "experiment=test_submission", checkpoint, *submission, target, DIR_SCRATCH="resumed")
    assert resumed.returncode == 0, resumed.stderr
    lines = [line for line in resumed.stderr.splitlines() if not line.startswith("Packed ")]
    assert [line.partition(":")[0] for line in lines] == [f"epoch {epochs + 1}/{epochs + 1}"]


def test_a_multirun_is_one_run_after_the_other(folder, train_here):
    out = train_here(folder, *FREIHAND, "-m", "seed=0,1", "trainer.max_epochs=1", DIR_SCRATCH="multi")
    configs = sorted(folder.glob(f"multi/logs/runs/{DATED}/config.yaml"))
    assert [yaml.safe_load(path.read_text())["seed"] for path in configs] == [0, 1]
    assert len(list(folder.glob(f"multi/logs/preds/{DATED}/pred.zip"))) == 2
    assert out.count("mm without reflection") == 4


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """What the program prints in an empty folder, where it only shows something."""

    def show(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with contextlib.suppress(SystemExit):
            run_script("train", main)
        output = capsys.readouterr()
        assert (output.err, list(tmp_path.iterdir())) == ("", [])
        return output.out

    return show


def test_help_says_what_can_be_given(shown):
    out = shown("--help")
    assert "python train.py best=" in out
    assert "experiment: exp_submission, exp_submission_wandb, test_submission" in out


def test_the_whole_configuration_can_be_printed(shown):
    config = yaml.safe_load(shown("--cfg", "job", "experiment=exp_submission"))
    assert (config["trainer"]["max_epochs"], config["model"]["encoder"]["name"]) == (145, "efficientnet_b4")


@pytest.mark.slow
def test_two_processes_train_one_network_and_share_the_prediction(folder):
    run = run_train(
        folder, *FREIHAND, "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1", DIR_SCRATCH="two"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("mm without reflection") == 2
    predictions = find_one(folder, f"two/logs/preds/{DATED}")
    checkpoint = json.loads((predictions / "metrics.json").read_text())["checkpoint"]
    alone = run_train(folder, *FREIHAND, "test=true", f"model.checkpoint_path={checkpoint}", DIR_SCRATCH="alone")
    assert alone.returncode == 0, alone.stderr
    shared, whole = (
        read_course(find_one(folder, f"{name}/logs/preds/{DATED}/test_preds.json.gz")) for name in ("two", "alone")
    )
    assert np.allclose(shared, whole, atol=1e-4)  # metres; two hands lie centimetres apart
