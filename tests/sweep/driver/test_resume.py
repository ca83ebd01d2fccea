"""What a sweep that goes on takes from its own folder, and what it refuses."""

import pytest
import yaml
from hydra.utils import instantiate

from handpose.config import compose, list_location_overrides, to_plain_values
from handpose.errors import UserError
from handpose.report.trial_table import TrialRow
from handpose.search.space import fix_params, flatten_config
from handpose.search.study import check_storage_url
from handpose.sweep.controller.history import make_empty_table
from handpose.sweep.driver.resume import (
    SweepTask,
    check_fingerprint,
    copy_space,
    describe_fixed_params,
    find_fixed_params,
    load_recorded_task,
    load_task_to_resume,
    make_sweep_record,
    read_recorded_budget,
    save_budgets,
)
from handpose.sweep.plan import SweepPlan, build_plan
from handpose.sweep.storage.folder_sync import FolderSync
from handpose.sweep.storage.object_store import ObjectStore
from handpose.yaml_files import write_yaml
from tests.data.layouts import write_coco_wholebody


@pytest.fixture
def folder(tmp_path, write_space):
    """Of a sweep that was begun."""
    folder = tmp_path / "outputs" / "sweeps" / "mine"
    overrides = ["sweep.name=mine", "optimizer.lr=0.007", f"paths.output={tmp_path / 'outputs'}", "scheduler=median"]
    config = compose("tune", overrides)
    space = write_space("optimizer.lr: tag(log, interval(1e-4, 1e-2))")
    task = SweepTask(config, overrides, list_location_overrides(config), {"model/decoder": "pyramid"}, space)
    copy_space(space, folder)
    write_yaml(folder / "sweep.yaml", make_sweep_record(task, {"data_fingerprint": "abc"}))
    space.file.write_text("edited: choice(1, 2)")  # for the next sweep
    return folder


def test_a_sweep_goes_on_as_it_was_configured(folder):
    task = load_recorded_task(folder, [f"sweep.resume={folder}", "sweep.num_trials=99"])
    before = yaml.safe_load((folder / "sweep.yaml").read_text())["config"]
    now = to_plain_values(task.config)
    assert now["sweep"] | {"num_trials": 12, "resume": None, "mode": "min"} == before["sweep"]
    assert now["sweep"]["num_trials"] == 99
    assert now["optimizer"] == before["optimizer"]
    assert now["scheduler"] == before["scheduler"]
    assert set(task.space.parameters) == {"optimizer.lr"}
    assert task.defaults["model/decoder"] == "pyramid"


def test_budgets_that_were_given_anew_hold_for_the_next_resume_too(folder):
    save_budgets(load_recorded_task(folder, ["sweep.num_trials=99", "sweep.time_budget_s=50", "sweep.preflight=off"]))
    sweep = load_recorded_task(folder, []).config.sweep
    assert (sweep.num_trials, sweep.time_budget_s, sweep.gpu_hours) == (99, 50, None)
    assert sweep.preflight == "brief"  # of that one resume
    assert load_recorded_task(folder, ["sweep.time_budget_s=null"]).config.sweep.time_budget_s is None


def test_a_new_budget_in_another_unit_replaces_the_recorded_one(folder):
    save_budgets(load_recorded_task(folder, ["budget.minutes=5"]))
    assert read_recorded_budget(folder).minutes == 5
    save_budgets(load_recorded_task(folder, ["budget.hours=12"]))
    recorded = read_recorded_budget(folder)
    assert (recorded.minutes, recorded.hours) == (None, 12)
    assert load_recorded_task(folder, ["budget.minutes=30"]).config.budget.hours is None


@pytest.fixture
def population(tmp_path, write_space):
    """The folder of a sweep with population based training."""
    folder = tmp_path / "outputs" / "sweeps" / "population"
    overrides = ["sweep.name=population", f"paths.output={tmp_path / 'outputs'}", "scheduler=pbt"]
    config = compose("tune", overrides)
    task = SweepTask(
        config, overrides, list_location_overrides(config), {}, write_space("optimizer.lr: interval(0.1, 0.2)")
    )
    copy_space(task.space, folder)
    write_yaml(folder / "sweep.yaml", make_sweep_record(task, {"data_fingerprint": "abc"}))
    return folder


def test_a_population_keeps_the_size_it_began_with(population):
    task = load_recorded_task(population, ["sweep.num_trials=20"])
    assert (task.config.sweep.num_trials, task.config.scheduler.population_size) == (20, 12)
    save_budgets(task)
    assert load_recorded_task(population, []).config.scheduler.population_size == 12


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["sweep.metric=val/pck_auc", "sweep.mode=min"], r"^sweep\.mode=min contradicts sweep\.metric=val/pck_auc"),
        (["sweep.mode=max"], r"^sweep\.mode=max contradicts sweep\.metric=val/pa_mpjpe_mm"),
        (
            ["sweep.metric=val/auc"],
            r"^sweep\.metric=val/auc is not measured; there are val/keypoint_error_px, .*pck_auc",
        ),
        (
            ["sweep.metric=val/pck_auc", "checkpoints.mode=min"],
            r"^checkpoints\.mode=min contradicts checkpoints\.metric",
        ),
    ],
)
def test_a_metric_that_cannot_rule_a_sweep_is_refused_before_any_work(
    tmp_path, write_space, monkeypatch, given, reason
):
    monkeypatch.setattr("handpose.sweep.plan.summarise_data", lambda config: pytest.fail("data were made ready"))
    overrides = [f"paths.output={tmp_path}", *given]
    config = compose("tune", overrides)
    space = write_space("optimizer.lr: interval(0.1, 0.2)")
    with pytest.raises(UserError, match=reason):
        build_plan(SweepTask(config, overrides, list_location_overrides(config), {}, space))


def test_data_with_2d_keypoints_can_be_swept_by_their_error_in_pixels(tmp_path, write_space):
    root = write_coco_wholebody(tmp_path / "coco")
    data = ["data=coco_wholebody", f"data.root={root}", "data.source.val_fraction=0.25", "data.image_size=64"]
    overrides = [*data, "data.batch_size=2", "model.encoder.name=test_efficientnet", f"paths.output={tmp_path}"]
    space = write_space("optimizer.lr: interval(0.1, 0.2)")

    def plan(*more: str) -> SweepPlan:
        config = compose("tune", [*overrides, *more])
        return build_plan(SweepTask(config, [*overrides, *more], list_location_overrides(config), {}, space))

    with pytest.raises(UserError, match=r"val/pa_mpjpe_mm needs joints in 3-D"):
        plan()
    assert plan("sweep.metric=val/keypoint_error_px").data.size.num_train == 6


def test_a_deadline_in_the_past_is_refused_before_any_work(tmp_path, write_space, monkeypatch):
    monkeypatch.setattr("handpose.sweep.plan.summarise_data", lambda config: pytest.fail("data were made ready"))
    overrides = [f"paths.output={tmp_path}", "budget.finish_by=2020-01-01T00:00"]
    config = compose("tune", overrides)
    task = SweepTask(config, overrides, list_location_overrides(config), {}, write_space("optimizer.lr: choice(1, 2)"))
    with pytest.raises(UserError, match=r"^budget.finish_by=2020-01-01T00:00 is in the past; give a later time, or"):
        build_plan(task)


def test_files_of_versions_that_recorded_a_mode_go_on(folder):
    file = folder / "sweep.yaml"
    content = yaml.safe_load(file.read_text())
    content["config"]["sweep"]["mode"] = content["config"]["checkpoints"]["mode"] = "min"
    write_yaml(file, content)
    load_recorded_task(folder, [])
    content["config"]["sweep"] |= {"metric": "val/pck_auc", "mode": "min"}
    content["overrides"].append("sweep.metric=val/pck_auc")
    write_yaml(file, content)
    with pytest.raises(UserError, match=r"sweep\.mode=min, which is the wrong direction of sweep\.metric=val/pck_auc"):
        load_recorded_task(folder, [])


def test_what_the_command_line_gives_is_held_and_stays_so_when_the_sweep_goes_on(tmp_path, write_space):
    folder = tmp_path / "outputs" / "sweeps" / "mine"
    overrides = ["sweep.name=mine", "optimizer.lr=0.007", f"paths.output={tmp_path / 'outputs'}"]
    config = compose("tune", overrides)
    space = write_space("optimizer.lr: tag(log, interval(1e-4, 1e-2))\nheatmap.sigma: interval(0.01, 0.05)")
    values = flatten_config(to_plain_values(config))
    held = find_fixed_params(space, ["sweep.name", "optimizer.lr", "paths.output"], values)
    assert held == {"optimizer.lr": 0.007}
    task = SweepTask(config, overrides, list_location_overrides(config), {}, fix_params(space, held), fixed=held)
    assert "every trial has optimizer.lr=0.007, as given on the command line" in describe_fixed_params(task)
    copy_space(space, folder)
    write_yaml(folder / "sweep.yaml", make_sweep_record(task, {"data_fingerprint": "abc"}))
    again = load_recorded_task(folder, [f"sweep.resume={folder}"])
    for each in (task, again):
        assert set(each.space.parameters) == {"heatmap.sigma"}
        assert each.space.fixed == {"optimizer.lr": 0.007}
    assert again.fixed == held
    assert again.origin == {"data_fingerprint": "abc"}


def test_a_prior_is_that_of_the_copied_space_and_cannot_be_weighed_anew(tmp_path, write_space):
    folder = tmp_path / "sweeps" / "mine"
    overrides = ["sweep.name=mine", f"paths.output={tmp_path}"]
    config = compose("tune", overrides)
    text = "optimizer.lr: tag(log, interval(1e-4, 1e-2))\nprior: {optimizer.lr: 0.001 +- factor 2}"
    space = write_space(text)
    copy_space(space, folder)
    task = SweepTask(config, overrides, list_location_overrides(config), {}, space)
    write_yaml(folder / "sweep.yaml", make_sweep_record(task, {}))
    space.file.write_text(text.replace("0.001", "0.009"))  # for the next sweep
    assert load_recorded_task(folder, []).space.priors == space.priors
    with pytest.raises(UserError, match=r"searcher.prior_probability=0.1: a resumed sweep keeps its configuration"):
        load_recorded_task(folder, ["searcher.prior_probability=0.1"])
    with pytest.raises(UserError, match=r"search_space=.*handpose\.sweep\.control DIR space"):
        load_recorded_task(folder, [f"search_space={space.file}"])


def test_a_sweep_of_a_version_without_priors_goes_on(folder):
    file = folder / "sweep.yaml"
    content = yaml.safe_load(file.read_text())
    del content["config"]["searcher"]["prior_probability"]
    write_yaml(file, content)
    assert load_recorded_task(folder, []).space.priors == {}


def test_nothing_is_held_that_the_space_does_not_set(write_space):
    space = write_space("optimizer.lr: interval(1e-4, 1e-2)\nmodel/decoder: choice(pyramid, effpose)")
    values = {"optimizer.lr": 0.1, "model/decoder": "effpose", "heatmap.sigma": 0.02}
    assert find_fixed_params(space, [], values) == {}
    assert find_fixed_params(space, ["heatmap.sigma", "sweep.name"], values) == {}
    assert find_fixed_params(space, ["model/decoder"], values) == {"model/decoder": "effpose"}


def test_a_folder_that_was_moved_is_gone_on_with_where_it_is(folder, tmp_path):
    moved = folder.rename(tmp_path / "elsewhere")
    config = load_recorded_task(moved, []).config
    assert (config.sweep.folder, config.sweep.name) == (str(moved), "mine")


@pytest.mark.parametrize(
    "given", ["optimizer.lr=1", "scheduler=asha", "sweep.seed=3", "searcher.points_to_evaluate=[]"]
)
def test_what_a_trial_is_cannot_be_changed(folder, given):
    with pytest.raises(UserError, match=rf"{given.split('=')[0]}=.*keeps its configuration.*sweep\.num_trials"):
        load_recorded_task(folder, [given])


def test_defaults_that_were_edited_since_are_told(folder):
    file = folder / "sweep.yaml"
    content = yaml.safe_load(file.read_text())
    content["config"]["heatmap"]["sigma"] = 0.123
    write_yaml(file, content)
    with pytest.raises(UserError, match=r"sweep\.yaml has heatmap\.sigma=0\.123, but configs/ now gives 0\.04"):
        load_recorded_task(folder, [])


def test_the_direction_of_a_sweep_is_that_of_its_metric(tmp_path):
    for metric, mode in (("val/pck_auc", "max"), ("val/keypoint_error_px", "min")):
        sweep = instantiate(compose("tune", [f"sweep.metric={metric}", f"paths.output={tmp_path}"]).sweep)
        table = make_empty_table(sweep)
        assert (sweep.target.mode, table.mode) == (mode, mode)
        for number, value in enumerate((0.2, 0.9, 0.5)):
            table.rows[number] = TrialRow(number, {}, state="complete", epochs=6, metrics={metric: value})
        assert table.rank_trials()[0].number == (1 if mode == "max" else 0)


def test_other_data_are_refused(folder):
    task = load_recorded_task(folder, [])
    check_fingerprint(task, "abc")
    with pytest.raises(UserError, match=r"started with other data \(fingerprint abc, and now xyz\)"):
        check_fingerprint(task, "xyz")


def test_a_sweep_from_a_store_goes_on_with_the_paths_of_this_process(folder, tmp_path, monkeypatch):
    (folder / "events.jsonl").write_text('{"event": "sweep_opened", "at": 0.0, "num_trials": 12, "gpus": 0.0}\n')
    url = f"file://{tmp_path}/store/mine"
    folder_sync = FolderSync(folder, ObjectStore(url))
    folder_sync.connect()
    folder_sync.finish(timeout_s=0.0)
    monkeypatch.setenv("DIR_SCRATCH", str(tmp_path / "here"))
    monkeypatch.setenv("MP_DATA", str(tmp_path / "data"))
    given = [f"sweep.resume={url}", "paths.output=there", f"paths.base={tmp_path}", "paths.packed=/local/packed"]
    with pytest.raises(UserError, match=r"paths\.base.*keeps its configuration"):
        load_task_to_resume(compose("tune", given), given)
    given.remove(f"paths.base={tmp_path}")
    monkeypatch.chdir(tmp_path)
    task = load_task_to_resume(compose("tune", given), given)
    there = tmp_path / "there" / "sweeps" / "mine"
    sweep, paths = task.config.sweep, task.config.paths
    assert (sweep.folder, sweep.resume, sweep.storage) == (str(there), str(there), f"file://{tmp_path}/store")
    assert (paths.output, paths.packed, paths.data) == (
        str(tmp_path / "there"),
        "/local/packed",
        str(tmp_path / "data"),
    )
    assert (there / "events.jsonl").read_bytes() == (folder / "events.jsonl").read_bytes()
    assert task.overrides == ["optimizer.lr=0.007", "scheduler=median"]
    assert "paths.packed=/local/packed" in task.locations


def test_a_folder_without_a_sweep_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=rf"sweep\.resume={tmp_path}: there is no .*sweep\.yaml"):
        load_recorded_task(tmp_path, [])
    (tmp_path / "sweep.yaml").write_text("config: {")
    with pytest.raises(UserError, match=r"sweep\.yaml is damaged"):
        load_recorded_task(tmp_path, [])
    (tmp_path / "sweep.yaml").write_text("")
    with pytest.raises(UserError, match="lacks config, overrides, locations, choices"):
        load_recorded_task(tmp_path, [])


PASSWORD = "hunter2hunter2"


def test_a_password_on_the_command_line_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"postgresql://me:\*\*\*@db/x .*\.env.*\$\{oc\.env:STUDY_URL\}") as refused:
        check_storage_url(f"postgresql://me:{PASSWORD}@db/x")
    assert PASSWORD not in str(refused.value)
    check_storage_url("postgresql://me@db/x")
    check_storage_url("sqlite:////folder/study.db")
    check_storage_url("${oc.env:STUDY_URL}")


def test_a_database_of_the_environment_is_kept_by_its_name(tmp_path, write_space, monkeypatch):
    monkeypatch.setenv("STUDY_URL", f"postgresql://me:{PASSWORD}@db/x")
    folder = tmp_path / "outputs" / "sweeps" / "mine"
    overrides = ["sweep.name=mine", "searcher.storage=${oc.env:STUDY_URL}", f"paths.output={tmp_path / 'outputs'}"]
    config = compose("tune", overrides)
    task = SweepTask(
        config, overrides, list_location_overrides(config), {}, write_space("optimizer.lr: interval(0.1, 0.2)")
    )
    copy_space(task.space, folder)
    write_yaml(folder / "sweep.yaml", make_sweep_record(task, {"data_fingerprint": "abc"}))
    assert PASSWORD not in (folder / "sweep.yaml").read_text()
    assert PASSWORD not in str(task.defaults)
    now = load_recorded_task(folder, [])
    assert now.config.searcher.storage == f"postgresql://me:{PASSWORD}@db/x"
    assert now.defaults["searcher.storage"] == "${oc.env:STUDY_URL}"
    monkeypatch.setenv("STUDY_URL", f"postgresql://me:{PASSWORD}@elsewhere/x")
    load_recorded_task(folder, [])


def test_another_database_is_refused_without_its_password(folder):
    with pytest.raises(UserError, match=r"searcher\.storage=postgresql://me:\*\*\*@db/x: ") as refused:
        load_recorded_task(folder, [f"searcher.storage=postgresql://me:{PASSWORD}@db/x"])
    assert PASSWORD not in str(refused.value)
