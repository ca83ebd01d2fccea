"""Checkpoints: which are kept, how they are written, and what a resumed run takes along."""

import io
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from handpose.config import to_plain_values
from handpose.errors import UserError
from handpose.training.checkpoints import AtomicCheckpointIO, BestAndLastCheckpoint, check_architecture, read_checkpoint
from handpose.training.fit import fit
from handpose.training.results import RunFolders

QUIET = ["pictures.every_n_steps=0", "logger=none"]


class FakeTrainer:
    """What BestAndLast asks of a Trainer, with metrics at will."""

    is_global_zero = True
    sanity_checking = False
    should_stop = False

    class state:  # noqa: N801
        fn = "fit"

    def __init__(self):
        self.current_epoch = -1
        self.callback_metrics = {}

    def save_checkpoint(self, path):
        path.write_text(f"after {self.current_epoch + 1} epochs")

    def validate(self, saver, *values):
        for value in values:
            self.current_epoch += 1
            self.callback_metrics = {saver.metric.name: torch.tensor(value)}
            saver.on_validation_end(self, None)


def make_saver(folder, **options):
    return BestAndLastCheckpoint(folder, **{"metric": "val/pa_mpjpe_mm", "mode": "min", "every_n_epochs": 1, **options})


def test_the_best_and_the_last_are_kept_and_no_other(tmp_path):
    saver = make_saver(tmp_path)
    FakeTrainer().validate(saver, 3.0, 1.25, 2.0, 1.5)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "best-epoch002-pa_mpjpe_mm1.250.ckpt": "after 2 epochs",
        "last.ckpt": "after 4 epochs",
    }
    assert (saver.best.name, saver.last.name) == ("best-epoch002-pa_mpjpe_mm1.250.ckpt", "last.ckpt")


def test_the_best_can_be_the_largest(tmp_path):
    saver = make_saver(tmp_path, mode="max")
    FakeTrainer().validate(saver, 0.25, 0.75, 0.5)
    assert saver.best.name == "best-epoch002-pa_mpjpe_mm0.750.ckpt"


def test_a_resumed_run_does_not_take_the_best_of_another_metric_along(tmp_path):
    before, after = make_saver(tmp_path, metric="val/pck_auc", mode="max"), make_saver(tmp_path)
    trainer = FakeTrainer()
    trainer.validate(before, 0.5)
    after.load_state_dict(before.state_dict())
    trainer.validate(after, 20.0)
    assert after.best.name == "best-epoch002-pa_mpjpe_mm20.000.ckpt"


def test_an_epoch_that_diverged_is_never_the_best(tmp_path):
    saver = make_saver(tmp_path)
    FakeTrainer().validate(saver, float("nan"), 2.0, float("nan"))
    assert saver.best.name == "best-epoch002-pa_mpjpe_mm2.000.ckpt"


def test_every_so_many_epochs_are_saved(tmp_path):
    FakeTrainer().validate(make_saver(tmp_path, every_n_epochs=2), 1.0, 4.0, 2.0)
    assert (tmp_path / "last.ckpt").read_text() == "after 2 epochs"


def test_a_resumed_run_takes_the_best_of_the_run_before_along(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    before, after = make_saver(first), make_saver(second)
    trainer = FakeTrainer()
    trainer.validate(before, 1.0, 2.0)
    after.load_state_dict(before.state_dict())
    trainer.validate(after, 1.5)
    assert after.best == second / "best-epoch001-pa_mpjpe_mm1.000.ckpt"
    assert after.best.read_text() == "after 1 epochs"
    trainer.validate(after, 0.5)
    assert {path.name for path in second.iterdir()} == {"best-epoch004-pa_mpjpe_mm0.500.ckpt", "last.ckpt"}
    assert before.best.is_file()  # that run may still be going on


def test_a_run_whose_folder_came_to_another_machine_goes_on_with_its_best(tmp_path):
    before = make_saver(tmp_path / "there")
    (tmp_path / "there").mkdir()
    FakeTrainer().validate(before, 1.0)
    state = before.state_dict()
    (tmp_path / "there").rename(tmp_path / "here")
    after = make_saver(tmp_path / "here")
    after.load_state_dict(state)
    assert (after.best, after.best_value) == (tmp_path / "here" / before.best.name, 1.0)


def test_a_resumed_run_starts_afresh_where_the_best_is_gone(tmp_path):
    before, after = make_saver(tmp_path), make_saver(tmp_path / "second")
    FakeTrainer().validate(before, 1.0)
    before.best.unlink()
    after.load_state_dict(before.state_dict())
    assert (after.best, after.best_value) == (None, float("inf"))


def test_a_reader_sees_one_whole_checkpoint_however_often_it_is_written(tmp_path):
    """An opened file stays the one before: a new one takes its place, it is not written over."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1000)}, path)
    with open(path, "rb") as opened:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1000)}, path)
        assert torch.load(opened, weights_only=True)["weights"].sum() == 0
    assert torch.load(path, weights_only=True)["weights"].sum() == 1000
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/last\.ckpt cannot be written"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file/last.ckpt")


def test_training_on_keeps_the_best_and_counts_on(configure, tmp_path):
    first = fit(configure(*QUIET), get_folder(tmp_path / "first"), quiet=True)
    config = configure(*QUIET, "trainer.max_epochs=3")
    second = fit(config, get_folder(tmp_path / "second"), quiet=True, resume_from=first.last_checkpoint)
    assert (first.epochs, second.epochs) == (2, 3)
    assert read_checkpoint(second.last_checkpoint)["epoch"] == 2
    assert second.best_checkpoint.parent == tmp_path / "second"
    assert get_value(second.best_checkpoint) <= get_value(first.best_checkpoint)


def get_folder(folder):
    return RunFolders(folder, folder, folder)


def get_value(path):
    return float(path.stem.partition("mm")[2])


def test_a_checkpoint_that_vanishes_before_it_is_read_is_told_with_those_beside_it(tmp_path):
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(UserError, match=r"there is no file .*best\.ckpt; its folder has last\.ckpt"):
        read_checkpoint(tmp_path / "best.ckpt")


def test_a_run_that_diverges_from_the_start_has_no_best(configure, folders):
    result = fit(configure(*QUIET, "optimizer.lr=1e30", "trainer.max_epochs=1"), folders, quiet=True)
    assert result.best_checkpoint is None
    assert result.last_checkpoint.is_file()


class Rates(pl.Callback):
    """The learning rate of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_resumed_run_has_the_learning_rate_that_is_asked_for(configure, folders):
    first = fit(configure(*QUIET, "trainer.max_epochs=1"), folders, quiet=True)

    def rates(*overrides):
        recorded = Rates()
        config = configure(*QUIET, "checkpoints.enabled=false", *overrides)
        fit(config, folders, callbacks=[recorded], quiet=True, resume_from=first.last_checkpoint)
        return recorded.values

    assert rates("lr_schedule=constant", "optimizer.lr=0.25") == [0.25, 0.25]
    assert rates("optimizer.lr=0.5") == pytest.approx([2 * rate for rate in rates("optimizer.lr=0.25")])


def test_a_run_can_go_on_with_another_optimizer(configure, folders):
    first = fit(configure(*QUIET, "trainer.max_epochs=1"), folders, quiet=True)
    config = configure(*QUIET, "optimizer._target_=torch.optim.SGD")
    assert fit(config, folders, quiet=True, resume_from=first.last_checkpoint).epochs == 2


def test_heatmaps_may_be_drawn_and_read_otherwise_with_weights_that_are_there(configure, tmp_path):
    wide, read = (
        to_plain_values(configure(*QUIET, *given)) for given in (["heatmap.sigma=0.1"], ["heatmap.read_out=debiased"])
    )
    check_architecture({"config": wide}, read, tmp_path)
    check_architecture({"config": wide}, to_plain_values(configure(*QUIET, "heatmap.target=laplacian")), tmp_path)
    with pytest.raises(UserError, match=r"give heatmap=image_axes"):
        check_architecture({"config": wide}, to_plain_values(configure(*QUIET, "heatmap=camera_axes")), tmp_path)


@pytest.mark.parametrize("given", ["conv=separable", "head=axes", "bins_per_cell=2"])
def test_another_decoder_has_another_architecture(configure, tmp_path, given):
    with pytest.raises(UserError, match=rf"another network than model\.decoder\.{given}; give model\.decoder\."):
        check_architecture(
            {"config": to_plain_values(configure(*QUIET))},
            to_plain_values(configure(*QUIET, f"model.decoder.{given}")),
            tmp_path,
        )


def test_weights_of_an_encoder_of_one_size_are_of_that_size_only(configure, tmp_path):
    small, large = (
        [to_plain_values(configure(*QUIET, f"model.encoder.name={name}", f"data.image_size={size}")) for name in NAMES]
        for size in (64, 96)
    )
    check_architecture({"config": small[0]}, large[0], tmp_path)
    with pytest.raises(UserError, match=r"another network than data\.image_size=96; give data\.image_size=64"):
        check_architecture({"config": small[1]}, large[1], tmp_path)


NAMES = ("lcnet_035", "test_vit")  # of any size, and of one


def test_a_checkpoint_of_an_earlier_version_is_told_from_one_of_another_choice(configure, tmp_path):
    config = to_plain_values(configure(*QUIET))
    before = {**config, "model": {**config["model"], "decoder": dict(config["model"]["decoder"])}}
    del before["model"]["decoder"]["conv"]
    with pytest.raises(
        UserError, match=r"an earlier version of this project, whose network lacks model\.decoder\.conv;"
    ):
        check_architecture({"config": before}, config, tmp_path)


def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c_and_leaves_the_one_before(tmp_path, monkeypatch):
    path, num_writes = tmp_path / "last.ckpt", 0
    AtomicCheckpointIO().save_checkpoint({"epoch": 0}, path)
    before = path.read_bytes()

    class Interrupted(io.FileIO):
        def write(self, content):
            nonlocal num_writes
            num_writes += 1
            if num_writes == 3:
                raise KeyboardInterrupt
            return super().write(content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda self, mode: Interrupted(self, mode))
        with pytest.raises(KeyboardInterrupt):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.rand(100_000)}, path)
    assert num_writes >= 3
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
