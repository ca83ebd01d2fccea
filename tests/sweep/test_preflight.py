"""What is refused before Ray starts."""

import pytest
import torch

from handpose.errors import UserError
from handpose.sweep.preflight import check_space, check_sweep, num_cores, prepare_data
from handpose.sweep.settings import RaySettings
from handpose.sweep.space import SPACES, load_space
from tests.sweep.conftest import make_settings

ALONE = RaySettings(address=None, num_cpus=None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_trials": 0}, "sweep.num_trials must be at least 1, but it is 0"),
        ({"max_epochs": 0}, "sweep.max_epochs must be at least 1"),
        ({"max_concurrent": 0}, "sweep.max_concurrent must be at least 1"),
        ({"time_budget_s": -1.0}, "sweep.time_budget_s must be above 0, but it is -1"),
        ({"gpus_per_trial": 1.5}, "sweep.gpus_per_trial must be a whole number or a part of one GPU, but it is 1.5"),
        ({"gpus_per_trial": 99}, "sweep.gpus_per_trial=99, but this machine has"),
        ({"cpus_per_trial": 10_000}, f"sweep.cpus_per_trial=10000, but this machine has {num_cores()} for trials"),
        ({"metric": "train/loss"}, "sweep.metric=train/loss is no validation metric"),
        ({"name": "a/b"}, "sweep.name=a/b must be the name of a folder"),
        ({"name": ".."}, "sweep.name=.. must be the name of a folder"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(tmp_path, changes, reason):
    with pytest.raises(UserError, match=f"^{reason}"):
        check_sweep(make_settings(tmp_path / "sweep", **changes), ALONE)
    assert not (tmp_path / "sweep").exists()


def test_a_gpu_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^sweep.gpus_per_trial=1, but this machine has no GPU$"):
        check_sweep(make_settings(tmp_path / "sweep", gpus_per_trial=1), ALONE)


def test_a_clusters_slots_are_not_measured_by_this_machine(tmp_path):
    settings = make_settings(tmp_path / "sweep", gpus_per_trial=99, cpus_per_trial=10_000)
    check_sweep(settings, RaySettings(address="auto", num_cpus=None))


def test_a_sweep_is_never_written_over_another(tmp_path):
    settings = make_settings(tmp_path / "sweep")
    check_sweep(settings, ALONE)
    check_sweep(settings, ALONE)  # nothing was written yet
    (tmp_path / "sweep").mkdir()
    check_sweep(settings, ALONE)
    (tmp_path / "sweep" / "trials.csv").write_text("number\n")
    with pytest.raises(UserError, match=r"^there is a sweep in .* already; choose another sweep.name"):
        check_sweep(settings, ALONE)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"sweep cannot be made in .*/file; set DIR_SCRATCH"):
        check_sweep(make_settings(tmp_path / "file" / "sweep"), ALONE)


@pytest.mark.parametrize("file", sorted(SPACES.iterdir()), ids=lambda file: file.name)
def test_every_shipped_space_composes(file):
    if file.suffix in (".yaml", ".py"):
        check_space(load_space(str(file)), [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("optimizer.lrr: interval(0.1, 1)", r"space.yaml: there is no configuration key optimizer.lrr; .*optimizer.lr"),
        ("model.decoder.depth: interval(1, 4)", r"space.yaml: model.decoder.depth=1.0: .*integer"),
        ("model/decoder: choice(pyramid, efpose)", r"space.yaml: model/decoder=efpose: .* did you mean effpose"),
        ("model.decoder.depth: range(-3, 2)", r"space.yaml: model.decoder.depth must be at least 0, but it is -3"),
    ],
)
def test_a_space_that_no_configuration_can_have_is_refused_with_its_file(write_space, text, reason):
    with pytest.raises(UserError, match=reason):
        check_space(write_space(text), [])


def test_a_grid_over_an_interval_is_refused(write_space):
    with pytest.raises(UserError, match="searcher=grid needs a list of values"):
        check_space(write_space("optimizer.lr: interval(0.1, 1)"), [], is_grid=True)


def test_a_missing_data_set_is_told_before_ray_starts(tmp_path):
    from handpose.config import compose

    with pytest.raises(UserError, match=str(tmp_path / "nowhere")):
        prepare_data(compose("train", ["data=freihand", f"data.root={tmp_path / 'nowhere'}"]))
