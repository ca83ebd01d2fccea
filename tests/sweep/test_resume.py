"""What a sweep that goes on takes from its own folder, and what it refuses."""

import pytest
import yaml

from handpose.config import compose, location_overrides, plain
from handpose.errors import UserError
from handpose.sweep.provenance import write_yaml
from handpose.sweep.resume import Task, check_data, description, keep_space, recorded_task


@pytest.fixture
def folder(tmp_path, write_space):
    """Of a sweep that was begun."""
    folder = tmp_path / "outputs" / "sweeps" / "mine"
    overrides = ["sweep.name=mine", "optimizer.lr=0.007", f"paths.output={tmp_path / 'outputs'}", "scheduler=median"]
    config = compose("tune", overrides)
    space = write_space("optimizer.lr: tag(log, interval(1e-4, 1e-2))")
    task = Task(config, overrides, location_overrides(config), {"model/decoder": "pyramid"}, space)
    keep_space(space, folder)
    write_yaml(folder / "sweep.yaml", description(task, {"data_fingerprint": "abc"}))
    space.file.write_text("edited: choice(1, 2)")  # for the next sweep
    return folder


def test_a_sweep_goes_on_as_it_was_configured(folder):
    task = recorded_task(folder, [f"sweep.resume={folder}", "sweep.num_trials=99"])
    before = yaml.safe_load((folder / "sweep.yaml").read_text())["config"]
    now = plain(task.config)
    assert now["sweep"] | {"num_trials": 12, "resume": None} == before["sweep"]
    assert now["sweep"]["num_trials"] == 99
    assert now["optimizer"] == before["optimizer"]
    assert now["scheduler"] == before["scheduler"]
    assert set(task.space.parameters) == {"optimizer.lr"}
    assert task.defaults["model/decoder"] == "pyramid"


def test_a_folder_that_was_moved_is_gone_on_with_where_it_is(folder, tmp_path):
    moved = folder.rename(tmp_path / "elsewhere")
    config = recorded_task(moved, []).config
    assert (config.sweep.folder, config.sweep.name) == (str(moved), "mine")


@pytest.mark.parametrize("given", ["optimizer.lr=1", "scheduler=asha", "sweep.max_epochs=3", "searcher.first=[]"])
def test_what_a_trial_is_cannot_be_changed(folder, given):
    with pytest.raises(UserError, match=rf"{given.split('=')[0]}=.*keeps its configuration.*sweep\.num_trials"):
        recorded_task(folder, [given])


def test_defaults_that_were_edited_since_are_told(folder):
    file = folder / "sweep.yaml"
    content = yaml.safe_load(file.read_text())
    content["config"]["heatmap"]["sigma"] = 0.123
    write_yaml(file, content)
    with pytest.raises(UserError, match=r"sweep\.yaml has heatmap\.sigma=0\.123, but configs/ now gives 0\.04"):
        recorded_task(folder, [])


def test_other_data_are_refused(folder):
    task = recorded_task(folder, [])
    check_data(task, "abc")
    with pytest.raises(UserError, match=r"begun with other data \(fingerprint abc, and now xyz\)"):
        check_data(task, "xyz")


def test_a_folder_without_a_sweep_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=rf"sweep\.resume={tmp_path}: there is no .*sweep\.yaml"):
        recorded_task(tmp_path, [])
    (tmp_path / "sweep.yaml").write_text("config: {")
    with pytest.raises(UserError, match=r"sweep\.yaml is damaged"):
        recorded_task(tmp_path, [])
    (tmp_path / "sweep.yaml").write_text("")
    with pytest.raises(UserError, match="lacks config, overrides, locations, choices"):
        recorded_task(tmp_path, [])
