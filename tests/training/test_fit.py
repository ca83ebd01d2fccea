import gzip
import json
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from handpose.config import compose, to_plain_values
from handpose.errors import UserError
from handpose.evaluation.submission import read_course, read_official
from handpose.metrics.official import compute_freihand_scores
from handpose.training.build import build_training
from handpose.training.checkpoints import check_architecture, read_checkpoint
from handpose.training.fit import fit, prepare_folders, prepare_run, train_and_test
from handpose.training.fit import test as run_test
from handpose.training.results import RunFolders
from tests.builders import write_freihand
from tests.training.conftest import SMALL

QUIET = ["pictures.every_n_steps=0", "logger=none"]


@pytest.fixture(scope="module")
def trained(freihand, tmp_path_factory):
    """A training of two epochs, for tests that read what it has left."""
    place = tmp_path_factory.mktemp("trained")
    config = compose("train", [*SMALL, *QUIET, f"data.root={freihand}", f"paths.output={place / 'outputs'}"])
    folders = RunFolders(place / "logs", place / "checkpoints", place / "predictions")
    for folder in (folders.logs, folders.checkpoints, folders.predictions):
        folder.mkdir()
    return config, fit(config, folders, quiet=True), folders


def test_the_best_checkpoint_has_its_value_in_its_name_and_last_stands_beside_it(trained):
    _, result, folders = trained
    best = result.metrics["val/pa_mpjpe_mm"]
    names = {path.name for path in folders.checkpoints.iterdir()}
    assert result.last_checkpoint.name == "last.ckpt"
    assert names == {result.best_checkpoint.name, "last.ckpt"}
    value = float(result.best_checkpoint.stem.partition("pa_mpjpe_mm")[2])
    assert value <= best + 5e-4


def test_a_checkpoint_is_plain_data_and_carries_the_configuration(trained):
    config, result, _ = trained
    checkpoint = torch.load(result.best_checkpoint, weights_only=True)
    assert checkpoint["config"] == to_plain_values(config)


def test_the_mean_pose_is_reported_beside_the_validation(trained):
    _, result, _ = trained
    assert 1.0 < result.metrics["baseline/pa_mpjpe_mm"] < 30.0
    assert result.epochs == 2


class Losses(pl.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def record_losses(config, folders, **options):
    recorded = Losses()
    fit(config, folders, callbacks=[recorded], quiet=True, **options)
    return recorded.values


def test_the_same_seed_trains_the_same_network(configure, folders):
    config = configure(*QUIET, "checkpoints.enabled=false")
    first, again = record_losses(config, folders), record_losses(config, folders)
    assert first == again
    assert first != record_losses(configure(*QUIET, "checkpoints.enabled=false", "seed=1"), folders)


def test_data_that_are_kept_open_change_no_loss_and_are_shared_by_trainings_of_one_data_set(configure, folders):
    silent = [*QUIET, "checkpoints.enabled=false"]
    config, other = configure(*silent), configure(*silent, "data.batch_size=4", "seed=3")
    plainly = [record_losses(each, folders) for each in (config, other)]
    assert [record_losses(each, folders, cache_data=True) for each in (config, other, config)] == [*plainly, plainly[0]]


def test_only_the_data_set_that_was_opened_last_is_kept(configure):
    def opened(*overrides):
        return build_training(configure(*overrides), quiet=True, cache_data=True)[1]

    first, same, smaller = opened(), opened("data.batch_size=4", "seed=1"), opened("data.image_size=32")
    assert same.splits is first.splits
    assert (same.batch_size, same.seed, first.batch_size) == (4, 1, 8)
    assert smaller.image_size == 32
    assert opened().splits is not first.splits


def test_a_resumed_run_goes_on_as_the_whole_one_would_have(configure, folders, tmp_path):
    """Stopped after an epoch of two and resumed: the losses of the second epoch are those of the uninterrupted run."""
    whole = record_losses(configure(*QUIET), folders)

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    config = configure(*QUIET)
    with pytest.raises(KeyboardInterrupt):
        fit(config, folders, callbacks=[Stop()], quiet=True)
    resumed = record_losses(config, folders, resume_from=folders.checkpoints / "last.ckpt")
    assert resumed == pytest.approx(whole[len(whole) // 2 :], rel=1e-5)


class Draws(pl.Callback):
    """First number of the generator that each batch is augmented with."""

    def __init__(self, *, stop_after=None):
        self.values, self._stop_after = [], stop_after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.values.append(float(torch.rand((), generator=pl_module._make_generator())))

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self._stop_after:
            raise KeyboardInterrupt


def test_batches_whose_gradients_are_accumulated_are_augmented_differently_also_after_a_resume(configure, folders):
    # 18 hands, 4 a batch: 4 batches an epoch, of which the last one is a step of its own
    config = configure(*QUIET, "data.batch_size=4", "+trainer.accumulate_grad_batches=3")
    whole, before, after = Draws(), Draws(stop_after=1), Draws()
    accumulated = fit(config, folders, callbacks=[whole], quiet=True).last_checkpoint
    weights = read_checkpoint(accumulated)["state_dict"]
    assert len(set(whole.values)) == len(whole.values) == 8
    with pytest.raises(KeyboardInterrupt):
        fit(config, folders, callbacks=[before], quiet=True)
    resumed = fit(config, folders, callbacks=[after], quiet=True, resume_from=folders.checkpoints / "last.ckpt")
    assert [*before.values, *after.values] == whole.values
    for name, value in read_checkpoint(resumed.last_checkpoint)["state_dict"].items():
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)


def test_without_accumulation_the_augmentation_is_a_function_of_seed_and_step(configure, folders):
    drawn = Draws()
    fit(configure(*QUIET, "seed=2", "checkpoints.enabled=false"), folders, callbacks=[drawn], quiet=True)
    seeds = (2 * 1_000_003 + step for step in range(len(drawn.values)))
    assert drawn.values == [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds]


@pytest.mark.slow
def test_trained_on_validation_too_the_last_checkpoint_counts_and_is_gone_on_from(configure, folders, tmp_path):
    """Stopped after an epoch of two and resumed: the same network as that of the uninterrupted run."""
    on_both = [*QUIET, "train_on_val=true"]
    whole = fit(configure(*on_both), folders, quiet=True)
    assert whole.best_checkpoint == whole.last_checkpoint == folders.checkpoints / "last.ckpt"
    assert [file.name for file in folders.checkpoints.iterdir()] == ["last.ckpt"]
    assert not any(name.startswith(("val/", "baseline/")) for name in whole.metrics)
    assert "trains on the validation split" in whole.format_validation()
    weights = read_checkpoint(whole.last_checkpoint)
    assert weights["global_step"] == 2 * (24 // 8)  # 18 hands to train on and 6 to validate, 8 a step

    class Stop(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt

    other = RunFolders(tmp_path / "other", tmp_path / "other", tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        fit(configure(*on_both), other, callbacks=[Stop()], quiet=True)
    assert len(record_losses(configure(*on_both), other, resume_from=tmp_path / "other" / "last.ckpt")) == 3
    resumed = read_checkpoint(tmp_path / "other" / "last.ckpt")
    assert resumed["global_step"] == weights["global_step"]
    for name, value in weights["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_training_on_validation_too_ends_in_test_predictions(configure):
    result = train_and_test(configure(*QUIET, "train_on_val=true"), quiet=True)
    assert result.checkpoint == result.folders.checkpoints / "last.ckpt"
    assert result.test_metrics["test/pa_mpjpe_mm"] > 0
    assert "validation  none: train_on_val=true trains on the validation split" in result.format_summary()


def test_the_test_writes_both_submissions_and_its_metrics(trained):
    config, result, folders = trained
    metrics = run_test(config, folders, result.best_checkpoint)
    course, official = (
        read_course(folders.predictions / "test_preds.json.gz"),
        read_official(folders.predictions / "pred.zip"),
    )
    assert course.shape == (6, 21, 3)
    assert np.allclose(course, official, atol=1e-6)
    with gzip.open(folders.predictions / "test_preds.json.gz") as file:
        assert np.shape(json.load(file)) == (6, 21, 3)
    assert zipfile.ZipFile(folders.predictions / "pred.zip").namelist() == ["pred.json"]
    assert json.loads((folders.predictions / "metrics.json").read_text())["metrics"] == metrics
    assert {"test/pa_mpjpe_mm", "test/keypoint_error_px", "baseline/pa_mpjpe_mm"} <= set(metrics)
    truth = json.loads((Path(config.data.root) / "evaluation_xyz.json").read_text())
    official_cm = compute_freihand_scores(course, np.array(truth))["xyz_al_mean3d_cm"]
    assert metrics["test/pa_mpjpe_official_mm"] == pytest.approx(10 * official_cm, rel=1e-3)


def test_test_predictions_do_not_use_the_true_size_of_the_hands_and_say_where_theirs_comes_from(
    configure, freihand, tmp_path
):
    root = shutil.copytree(freihand, tmp_path / "no_scale")
    given = train_and_test(configure(*QUIET, "trainer.max_epochs=1"), quiet=True)
    for split in ("training", "evaluation"):
        (root / f"{split}_scale.json").unlink()
    overrides = [f"data.root={root}", "test=true", f"model.checkpoint_path={given.checkpoint}"]
    assumed = train_and_test(configure(*QUIET, *overrides), quiet=True)

    of_given, of_assumed = (read_official(result.folders.predictions / "pred.zip") for result in (given, assumed))
    ratio = of_assumed[:, 0] / of_given[:, 0]
    truth = np.array(json.loads((root / "evaluation_xyz.json").read_text()))
    true_length = np.linalg.norm(truth[:, 10] - truth[:, 9], axis=-1)
    # The same hand in another size: that of the training set in the mean.
    sizes = ratio.mean(axis=-1) * true_length
    assert sizes == pytest.approx(sizes[0], rel=1e-3)
    of_true_size = assumed.test_metrics["test/rr_mpjpe_true_size_mm"]
    assert of_true_size == pytest.approx(given.test_metrics["test/rr_mpjpe_mm"], rel=1e-3)
    assert "test/rr_mpjpe_true_size_mm" not in given.test_metrics

    said = [
        json.loads((each.folders.predictions / "metrics.json").read_text())["hand_size"] for each in (given, assumed)
    ]
    assert said[0].startswith("given: ")
    assert said[1].startswith("assumed: the mean length of the reference bone in training")
    assert "with the given hand size" in given.format_summary()
    assert f"with the true size, the root-relative error is {of_true_size:.2f} mm" in assumed.format_summary()


def test_pictures_and_scalars_are_in_the_log(configure, folders):
    fit(configure("pictures.every_n_steps=2"), folders, quiet=True)
    log = EventAccumulator(str(folders.logs / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {f"val_pictures/{name}" for name in ("keypoints", "skeletons", "heatmaps")} <= set(log.Tags()["images"])
    assert [event.step for event in log.Images("val_pictures/keypoints")] == [2, 4]
    for name in ("val/pa_mpjpe_mm", "train/loss"):  # by epoch, as the trials of a sweep beside it
        assert [event.step for event in log.Scalars(name)] == [1, 2]


@pytest.mark.parametrize(
    "override",
    ["model.encoder.name=lcnet_035", "model.decoder.depth=3", "model/decoder=effpose", "heatmap=camera_axes"],
)
def test_a_checkpoint_of_another_architecture_is_refused_with_the_overrides_that_mend_it(trained, configure, override):
    _, result, _ = trained
    path = result.best_checkpoint
    checkpoint = read_checkpoint(path)
    with pytest.raises(UserError, match=rf"another network than .*{override}.*; give ") as told:
        check_architecture(checkpoint, to_plain_values(configure(override)), path)
    remedy = shlex.split(str(told.value).partition("; give ")[2])
    assert override.partition("=")[0] in [item.partition("=")[0] for item in remedy]
    check_architecture(checkpoint, to_plain_values(configure(*remedy)), path)


class Malice:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint ran code')",))


@pytest.mark.parametrize("content", ["malice", "text", "half", "other", "bare"])
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_no_code(trained, tmp_path, content):
    _, result, _ = trained
    path = tmp_path / "foreign.ckpt"
    if content == "malice":
        torch.save({"state_dict": {}, "config": Malice()}, path)
    elif content == "text":
        path.write_text("not a checkpoint")
    elif content == "half":
        path.write_bytes(result.best_checkpoint.read_bytes()[:5000])
    elif content == "bare":
        torch.save({"state_dict": {}, "config": {}}, path)
    else:
        torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"foreign\.ckpt is not a checkpoint of this project"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_named(configure, folders):
    with pytest.raises(UserError, match=r"there is no file /nowhere/last\.ckpt"):
        fit(configure("model.checkpoint_path=/nowhere/last.ckpt"), folders)


@pytest.mark.parametrize("override", ["test=true", "resume=true"])
def test_a_checkpoint_must_be_given_where_one_is_needed(configure, folders, override):
    with pytest.raises(UserError, match=r"give model\.checkpoint_path=FILE"):
        train_and_test(configure(override), folders)


def test_two_runs_of_one_second_have_folders_of_their_own(configure):
    config = configure()
    first, second = prepare_folders(config.copy()), prepare_folders(config.copy())
    assert first.logs != second.logs
    assert first.checkpoints != second.checkpoints
    assert (first.logs / "config.yaml").is_file()
    assert (second.logs / "config.yaml").is_file()


@pytest.mark.parametrize("fused", ["true", "false"])
def test_mixed_precision_trains_like_full_precision(configure, folders, fused):
    """With gradient clipping, which Lightning refuses for fused optimizers; bfloat16 keeps 8 bits."""
    given = [*QUIET, "checkpoints.enabled=false", f"optimizer.fused={fused}"]
    full = record_losses(configure(*given), folders)
    mixed = record_losses(configure(*given, "trainer.precision=bf16-mixed"), folders)
    assert mixed == pytest.approx(full, rel=0.05)
    assert mixed != full


def test_the_logged_loss_is_the_mean_over_the_steps_of_its_epoch(configure, folders):
    recorded = Losses()
    result = fit(configure(*QUIET, "checkpoints.enabled=false"), folders, callbacks=[recorded], quiet=True)
    last_epoch = recorded.values[len(recorded.values) // 2 :]
    assert result.metrics["train/loss"] == pytest.approx(np.mean(last_epoch), rel=1e-5)
    terms = [value for name, value in result.metrics.items() if name.startswith("train/") and name.endswith("_loss")]
    assert len(terms) == 4
    assert sum(terms) == pytest.approx(result.metrics["train/loss"], rel=1e-5)


def write_other_hands(tmp_path):
    return write_freihand(tmp_path / "other", num_poses=30, variants=1, num_test=6, size=64, seed=7)


def test_a_training_begins_with_the_weights_of_a_checkpoint_and_takes_nothing_else_of_it(trained, configure, tmp_path):
    _, result, _ = trained
    root = write_other_hands(tmp_path)
    given = [*QUIET, f"data.root={root}", f"model.weights={result.best_checkpoint}"]
    tuned = prepare_run(configure(*given), stage="fit", quiet=True)
    saved = read_checkpoint(result.best_checkpoint)["state_dict"]
    ours = tuned.module.state_dict()
    fresh = prepare_run(configure(*QUIET, f"data.root={root}"), stage="fit", quiet=True).module.state_dict()
    taken_from_data = {"axes.bone_lengths", "axes.scale_m"}
    assert all(torch.equal(ours[name], saved[name]) for name in saved.keys() - taken_from_data)
    assert all(torch.equal(ours[name], fresh[name]) for name in taken_from_data)
    assert not torch.equal(ours["axes.depth_range"], fresh["axes.depth_range"])
    begun = fit(configure(*given, "trainer.max_epochs=1"), get_folder(tmp_path / "tuned"), quiet=True)
    assert begun.epochs == 1
    assert read_checkpoint(begun.last_checkpoint)["global_step"] == 2  # counted anew
    assert begun.best_checkpoint.parent == tmp_path / "tuned"


def get_folder(folder):
    return RunFolders(folder, folder, folder)


def test_a_training_that_began_with_weights_goes_on_from_its_own_checkpoint(trained, configure, tmp_path):
    _, result, _ = trained
    given = [*QUIET, f"model.weights={result.best_checkpoint}"]
    whole = record_losses(configure(*given), get_folder(tmp_path / "whole"))
    half = fit(configure(*given, "checkpoints.every_n_epochs=1"), get_folder(tmp_path / "half"), quiet=True)
    again = record_losses(
        configure(*given, "trainer.max_epochs=3"), get_folder(tmp_path / "on"), resume_from=half.last_checkpoint
    )
    assert len(again) == len(whole) // 2


def test_weights_of_another_architecture_are_refused(trained, configure):
    _, result, _ = trained
    with pytest.raises(UserError, match=r"another network than .*model\.decoder\.depth=3.*; give .*depth=2"):
        prepare_run(
            configure(f"model.weights={result.best_checkpoint}", "model.decoder.depth=3"), stage="fit", quiet=True
        )


def test_weights_to_begin_with_are_named_when_they_are_missing(configure):
    with pytest.raises(UserError, match=r"model\.weights: there is no file /nowhere/best\.ckpt"):
        prepare_run(configure("model.weights=/nowhere/best.ckpt"), stage="fit", quiet=True)


def test_a_run_either_begins_with_weights_or_goes_on(trained, configure, folders):
    _, result, _ = trained
    both = [f"model.weights={result.best_checkpoint}", f"model.checkpoint_path={result.last_checkpoint}"]
    with pytest.raises(UserError, match=r"give only one of them \(model\.weights=null to resume\)"):
        fit(configure(*both), folders, quiet=True)


def test_backgrounds_are_trained_with_where_there_are_masks(configure, folders, freihand, tmp_path):
    with pytest.raises(UserError, match=r"augment\.background needs the masks"):
        prepare_run(configure("augment.background=0.5"), stage="fit", quiet=True)
    masked = write_freihand(tmp_path / "masked", num_poses=24, variants=1, num_test=6, size=64, masks=True)
    silent = [*QUIET, "checkpoints.enabled=false", f"data.root={masked}"]
    plain, behind = (record_losses(configure(*silent, f"augment.background={share}"), folders) for share in (0.0, 1.0))
    assert len(behind) == len(plain)
    assert behind != plain


@pytest.mark.parametrize(
    "overrides",
    [
        ["+trainer.max_steps=1"],  # within the first epoch of two batches
        ["+trainer.max_steps=1", "trainer.check_val_every_n_epoch=2"],
        ["+trainer.max_steps=1", "checkpoints.every_n_epochs=2"],
        ["+trainer.max_steps=1", "checkpoints.every_n_epochs=2", "train_on_val=true"],
    ],
)
def test_a_run_that_max_steps_ends_within_an_epoch_leaves_its_last_step(configure, folders, overrides):
    result = train_and_test(configure(*QUIET, *overrides), folders, quiet=True)
    assert torch.load(folders.checkpoints / "last.ckpt", weights_only=True)["global_step"] == 1
    assert torch.load(result.checkpoint, weights_only=True)["global_step"] == 1
    assert "test/pa_mpjpe_mm" in result.test_metrics
    assert "train/loss" in result.training.metrics


def test_the_steps_after_the_last_whole_epoch_are_validated(configure, folders):
    result = fit(configure(*QUIET, "+trainer.max_steps=3"), folders, quiet=True)
    assert torch.load(result.last_checkpoint, weights_only=True)["global_step"] == 3


def test_a_run_that_max_steps_ended_goes_on_with_more_steps(configure, folders, tmp_path):
    fit(configure(*QUIET, "+trainer.max_steps=1"), folders, quiet=True)
    checkpoint = f"model.checkpoint_path={folders.checkpoints / 'last.ckpt'}"
    with pytest.raises(UserError, match=r"was trained for 1 steps and trainer\.max_steps=1; give a larger"):
        train_and_test(configure(*QUIET, "+trainer.max_steps=1", checkpoint), quiet=True)
    on = RunFolders(*[tmp_path] * 3)
    with pytest.warns(UserWarning, match="resuming from a checkpoint that ended before the epoch ended"):
        result = fit(configure(*QUIET, "+trainer.max_steps=2", checkpoint), on, quiet=True)
    assert torch.load(result.last_checkpoint, weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("time", ["'00:00:00:01'", "{seconds:1}"])
def test_a_run_that_max_time_ends_is_validated_and_tested(configure, folders, time):
    config = configure(
        *QUIET,
        *["trainer.max_epochs=100000", "trainer.check_val_every_n_epoch=100000", "checkpoints.every_n_epochs=100000"],
        f"+trainer.max_time={time}",
    )
    result = train_and_test(config, folders, quiet=True)
    assert result.training.epochs < 1000
    assert "test/pa_mpjpe_mm" in result.test_metrics


@pytest.fixture
def twenty(tmp_path):
    """A data set with 20 test hands: three batches of 8 at most."""
    return write_freihand(tmp_path / "twenty", num_poses=24, variants=1, num_test=20, size=64)


@pytest.mark.parametrize("limit", ["limit_predict_batches=1", "limit_predict_batches=0", "limit_test_batches=0.01"])
def test_predictions_cover_the_whole_test_split_whatever_the_limits(configure, folders, twenty, capfd, limit):
    config = configure(*QUIET, "trainer.max_epochs=1", f"data.root={twenty}", f"+trainer.{limit}")
    train_and_test(config, folders)
    assert read_course(folders.predictions / "test_preds.json.gz").shape == (20, 21, 3)
    assert f"trainer.{limit} is ignored: predictions cover the whole test split" in capfd.readouterr().err


@pytest.mark.parametrize(("given", "num_batches"), [("true", 1), ("1", 1), ("2", 2)])
def test_fast_dev_run_runs_a_few_batches_of_each_stage(configure, twenty, given, num_batches):
    more = ["trainer.max_epochs=50", "trainer.check_val_every_n_epoch=5", "checkpoints.every_n_epochs=5"]
    more += ["pictures.every_n_steps=0"]
    result = train_and_test(configure(f"+trainer.fast_dev_run={given}", f"data.root={twenty}", *more), quiet=True)
    checkpoint = torch.load(result.checkpoint, weights_only=True)
    assert (checkpoint["global_step"], result.training.epochs) == (num_batches, 1)
    predicted_m = read_course(result.folders.predictions / "test_preds.json.gz")
    assert predicted_m.shape == (8 * num_batches, 21, 3)
    assert read_official(result.folders.predictions / "pred.zip").shape == predicted_m.shape
    metrics = json.loads((result.folders.predictions / "metrics.json").read_text())["metrics"]
    assert metrics["test/pa_mpjpe_mm"] > 0
    assert {folder.name for folder in vars(result.folders).values()} == {"fast_dev_run"}
    assert (result.folders.logs / "tensorboard").is_dir()


def test_fast_dev_run_that_is_off_changes_nothing(configure, folders):
    result = fit(configure(*QUIET, "+trainer.fast_dev_run=false"), folders, quiet=True)
    assert result.epochs == 2


def test_fast_dev_run_predicts_a_batch_with_a_checkpoint(configure, trained, twenty):
    _, result, _ = trained
    checkpoint = f"model.checkpoint_path={result.best_checkpoint}"
    config = configure(*QUIET, f"data.root={twenty}", "test=true", checkpoint, "+trainer.fast_dev_run=true")
    tested = train_and_test(config, quiet=True)
    assert read_course(tested.folders.predictions / "test_preds.json.gz").shape == (8, 21, 3)
    assert tested.folders.predictions.name == "fast_dev_run"


def test_fast_dev_run_resumes_no_training(configure, trained):
    _, result, _ = trained
    config = configure(*QUIET, f"model.checkpoint_path={result.last_checkpoint}", "+trainer.fast_dev_run=true")
    with pytest.raises(UserError, match=r"give model\.weights=.*last.ckpt instead of model\.checkpoint_path"):
        train_and_test(config, quiet=True)


def test_the_profile_of_a_run_lies_in_its_log(configure, folders):
    fit(configure(*QUIET, "trainer.max_epochs=1", "+trainer.profiler=simple"), folders, quiet=True)
    assert "run_training_batch" in (folders.logs / "fit-profile.txt").read_text()


def test_an_anomaly_that_was_asked_for_is_a_sentence(configure, folders):
    config = configure(*QUIET, "+trainer.detect_anomaly=true", "optimizer.lr=1e30")
    with (
        pytest.warns(UserWarning, match="Error detected in"),
        pytest.raises(UserError, match=r"trainer\.detect_anomaly=true: Function '\w+' returned nan values"),
    ):
        fit(config, folders, quiet=True)
