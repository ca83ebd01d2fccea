"""Every file in configs/scheduler and configs/searcher makes what it names; a sweep with it composes."""

import warnings

import pytest
from hydra.utils import instantiate

from handpose.config import compose, to_plain_values
from handpose.config_files import CONFIGS
from handpose.errors import UserError
from handpose.schema import bind_arguments
from handpose.search.searcher import Searcher
from handpose.search.space import load_space
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler, restore_scheduler
from handpose.sweep.record.settings import RaySettings, SweepSettings
from tests.sweep.objectives import METRIC


def list_names(group):
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize("name", list_names("scheduler"))
def test_every_scheduler_makes_fresh_rules(name):
    config = compose("tune", [f"scheduler={name}"])
    fresh = bind_scheduler(instantiate(config.scheduler), instantiate(config.sweep), load_space("default"))
    one, other = fresh(), fresh()
    assert one is not other
    for scheduler in (one, other):
        scheduler.on_trial_start(0, {"optimizer.lr": 0.005, "heatmap.sigma": 0.04, "model.decoder.depth": 3})
        assert scheduler.on_trial_result(0, 1, 20.0) == "continue"


@pytest.mark.parametrize("override", ["grace_period=0", "reduction_factor=1", "grace_period=99"])
def test_values_of_a_scheduler_that_do_not_go_together_are_a_sentence(override):
    config = compose("tune", [f"scheduler.{override}"])
    with pytest.raises(UserError, match=f"scheduler.{override.partition('=')[0]}"):
        bind_scheduler(instantiate(config.scheduler), instantiate(config.sweep), load_space("default"))


@pytest.mark.parametrize(("name", "rule"), [("median", "MedianStopping"), ("pbt", "PopulationBased")])
def test_a_scheduler_that_compares_one_objective_is_refused_for_two(name, rule):
    config = compose("tune", [f"scheduler={name}", "sweep.second_objective=latency_ms"])
    with pytest.raises(
        UserError, match=rf"second_objective=latency_ms needs a scheduler .*asha or fifo: {rule} compares"
    ):
        bind_scheduler(instantiate(config.scheduler), instantiate(config.sweep), load_space("default"))


@pytest.mark.parametrize("name", ["asha", "fifo"])
def test_the_others_take_a_second_objective(name):
    config = compose("tune", [f"scheduler={name}", "sweep.second_objective=latency_ms"])
    scheduler = bind_scheduler(instantiate(config.scheduler), instantiate(config.sweep), load_space("default"))()
    for trial, cost in enumerate([5.0, 6.0]):
        scheduler.on_trial_start(trial, {})
        scheduler.on_trial_cost(trial, cost)
    assert scheduler.on_trial_result(0, 1, 20.0) == "continue"
    assert scheduler.on_trial_result(1, 1, 21.0) == ("stop" if name == "asha" else "continue")


@pytest.mark.parametrize(
    ("name", "rungs", "selects_only_at_rungs"),
    [("asha", (1, 3), True), ("fifo", (), True), ("median", (), False)],
)
def test_the_scheduler_of_a_recorded_sweep_says_where_it_compared_trials(name, rungs, selects_only_at_rungs):
    config = to_plain_values(compose("tune", [f"scheduler={name}", "sweep.max_epochs=9"]))
    scheduler = restore_scheduler(config["scheduler"], instantiate(config["sweep"]))
    assert scheduler.rungs == rungs
    assert scheduler.selects_only_at_rungs is selects_only_at_rungs


@pytest.mark.parametrize("change", [{"_target_": "os.getcwd"}, {"_target_": None}, {"no_such_option": 1}])
def test_a_recorded_scheduler_that_configs_do_not_name_is_not_made(change):
    config = to_plain_values(compose("tune", []))
    assert restore_scheduler(config["scheduler"] | change, instantiate(config["sweep"])) is None


@pytest.mark.parametrize("name", list_names("searcher"))
def test_every_searcher_can_be_made(name, tmp_path, write_space):
    config = compose("tune", [f"searcher={name}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        searcher = bind_arguments(
            instantiate(config.searcher),
            space=write_space("optimizer.lr: choice(0.1, 0.2)"),
            folder=tmp_path,
            name="test",
            metric=METRIC,
            mode="min",
            max_epochs=2,
            seed=0,
            defaults={},
        )()
    assert isinstance(searcher, Searcher)
    assert searcher.suggest(0)["optimizer.lr"] in (0.1, 0.2)
    searcher.close()


@pytest.mark.parametrize("name", list_names("ray"))
def test_settings_are_those_of_the_configuration(name):
    config = compose("tune", [f"ray={name}", "sweep.name=mine", "sweep.num_trials=3"])
    assert isinstance(instantiate(config.ray), RaySettings)
    sweep = instantiate(config.sweep)
    assert isinstance(sweep, SweepSettings)
    assert sweep.path.is_absolute()
    assert sweep.path.parts[-2:] == ("sweeps", "mine")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sweep.num_trails=3", "there is no configuration key sweep.num_trails; did you mean sweep.num_trials"),
        ("sweep.num_trials=many", "sweep.num_trials=many: .*integer"),
        ("sweep.mode=least", "sweep.mode=least: .*'min' or 'max'"),
        ("sweep.second_objective=speed", "sweep.second_objective=speed: .*'latency_ms', 'num_parameters' or 'mem"),
        ("scheduler=ahsa", "scheduler=ahsa: no such choice; did you mean asha"),
        (
            "searcher.sampler.n_startup=3",
            "there is no configuration key searcher.sampler.n_startup; .*n_startup_trials",
        ),
        (
            "scheduler.grace_periodd=1",
            "no configuration key scheduler.grace_periodd; .*scheduler.grace_period",
        ),
        (
            "searcher.sampler.multivariate=true",
            "searcher.sampler.multivariate with this choice; it is a key of searcher=tpe$",
        ),
    ],
)
def test_a_wrong_key_or_value_is_told(override, reason):
    with pytest.raises(UserError, match=reason):
        compose("tune", [override])
