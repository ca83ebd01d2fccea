"""What a searcher proposes and learns from after the user has changed the search space, also after a crash."""

import math
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from handpose.errors import UserError
from handpose.search.points import place_configuration, place_values
from handpose.search.space import parse_space
from handpose.search.study import PLACED_ATTRIBUTE, get_placed_params, get_trial_params, open_storage
from tests.search.test_optuna_searcher import GRID, NUMBERS, SAMPLERS, TPE, list_states, read_study, run_alone
from tests.search.test_optuna_searcher import make as make  # the fixture
from tests.search.trial_feed import killed_after_trials

DEFAULTS = {"optimizer.lr": 1e-3, "model.decoder.depth": 3, "heatmap.sigma": 0.04, "model/decoder": "pyramid"}
NARROW = "optimizer.lr: tag(log, interval(1e-4, 1e-2))\nmodel.decoder.depth: range(2, 5)\n"
WITHOUT_DEPTH = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\n"
WITH_SIGMA = NUMBERS + "heatmap.sigma: interval(0.03, 0.05)\n"
OTHER_CHOICES = "optimizer.lr: choice(1e-2, 1e-3, 1e-4)\nmodel.decoder.depth: choice(5, 4, 3, 2, 1)\n"
CONDITIONAL = """
def space(trial):
    depth = trial.suggest_categorical("model.decoder.depth", [1, 3, 5])
    params = {"model.decoder.depth": depth, "optimizer.lr": trial.suggest_float("optimizer.lr", 1e-5, 1e-1, log=True)}
    if depth > 1:
        params["heatmap.sigma"] = trial.suggest_float("heatmap.sigma", 0.03, 0.05)
    return params
"""
OWN_NAMES = """
def space(trial):
    return {"optimizer.lr": 10 ** trial.suggest_float("log_lr", LOW, -1), "model.decoder.depth": 3}
"""


def read_space(text):
    return parse_space(text, Path("space.py" if "def space" in text else "space.yaml"))


def change_space(searcher, text):
    """What the sweep does when the user changes the space."""
    space, snapshots = read_space(text), list(searcher.snapshots.values())
    searcher.check_space(space, snapshots)
    searcher.on_space(space, snapshots)
    searcher.restore_trials(snapshots)


def raise_epochs(searcher, max_epochs):
    """What the sweep does when the user raises the number of epochs: complete trials go on."""
    searcher.on_max_epochs(max_epochs)
    searcher.restore_trials(
        [each._replace(state="paused") if each.state == "complete" else each for each in searcher.snapshots.values()]
    )


def run_on(searcher, num_trials):
    """Some more trials, one after the other. Returns their parameters."""
    asked = []
    for number in range(len(searcher.snapshots), len(searcher.snapshots) + num_trials):
        asked.append(searcher.suggest(number))
        searcher.on_trial_result(number, 1, abs(math.log10(asked[-1]["optimizer.lr"]) + 3))
        searcher.on_trial_end(number, "stopped")
    return asked


# --- which trials count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "params", "expected"),
    [
        (NARROW, {"optimizer.lr": 1e-3, "model.decoder.depth": 4}, {"optimizer.lr": 1e-3, "model.decoder.depth": 4}),
        (NARROW, {"optimizer.lr": 1e-1, "model.decoder.depth": 4}, None),
        (NARROW, {"optimizer.lr": 1e-3, "model.decoder.depth": 5}, None),
        (WITHOUT_DEPTH, {"optimizer.lr": 1e-1, "model.decoder.depth": 3}, {"optimizer.lr": 1e-1}),
        (WITHOUT_DEPTH, {"optimizer.lr": 1e-1, "model.decoder.depth": 2}, None),
        (NUMBERS, {"optimizer.lr": 1e-2}, {"optimizer.lr": 1e-2, "model.decoder.depth": 3}),
        ("heatmap.sigma: interval(0.05, 0.06)\n", {"optimizer.lr": 1e-3}, None),
        (
            CONDITIONAL,
            {"optimizer.lr": 1e-3, "model.decoder.depth": 1},
            {"optimizer.lr": 1e-3, "model.decoder.depth": 1},
        ),
        (
            CONDITIONAL,
            {"optimizer.lr": 1e-3, "model.decoder.depth": 5},
            {"optimizer.lr": 1e-3, "model.decoder.depth": 5, "heatmap.sigma": 0.04},
        ),
        (CONDITIONAL, {"optimizer.lr": 1e-3, "model.decoder.depth": 1, "heatmap.sigma": 0.05}, None),
        (NARROW + "model/decoder: effpose\n", {"optimizer.lr": 1e-3, "model.decoder.depth": 4}, None),
    ],
)
def test_a_configuration_lies_in_a_space_if_the_same_network_is_trained_in_the_same_way(text, params, expected):
    placed = place_configuration(read_space(text), params, DEFAULTS)
    assert (None if placed is None else placed.params) == expected


@pytest.mark.parametrize("text", [NARROW, WITHOUT_DEPTH, WITH_SIGMA, OTHER_CHOICES, CONDITIONAL])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_goes_on_in_the_new_space(make, write_space, name, text):
    searcher = make(write_space(NUMBERS), SAMPLERS[name], defaults=DEFAULTS)
    before = run_alone(searcher, 6)
    change_space(searcher, text)
    asked = run_on(searcher, 5 if name == "gp" else 9)
    for params in asked:
        placed = place_values(read_space(text), params)
        assert (placed.params, placed.out_of_range, placed.missing) == (params, (), ())
    together = [*(params for params in before if place_configuration(read_space(text), params, DEFAULTS)), *asked]
    placed = [place_configuration(read_space(text), params, DEFAULTS).params for params in together]
    assert len({str(sorted(params.items())) for params in placed}) == len(placed), "a training was repeated"
    assert [get_trial_params(trial) for trial in searcher.study.trials] == [*before, *asked]


def test_the_study_keeps_all_results_and_has_draws_only_where_the_new_space_contains_them(make, write_space):
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS)
    before = run_alone(searcher, 12)
    old, states = read_study(searcher), list_states(searcher)
    change_space(searcher, NARROW)
    new = read_study(searcher)
    assert searcher.study.study_name == "test (search space 2)"
    assert list_states(searcher) == states
    for name in ("values", "intermediate_values"):
        assert [trial[name] for trial in new] == [trial[name] for trial in old]
    inside = [place_configuration(read_space(NARROW), params, DEFAULTS) is not None for params in before]
    assert {True, False} == set(inside)
    assert [bool(trial["params"]) for trial in new] == inside
    assert [get_trial_params(trial) for trial in searcher.study.trials] == before
    space = read_space(NARROW)
    assert all(trial["distributions"] == space.parameters for trial in new if trial["params"])
    first = optuna.load_study(study_name="test", storage=searcher._storage)
    assert [trial.params for trial in first.trials] == [trial["params"] for trial in old]


def test_a_sampler_learns_from_trials_inside_and_not_from_those_outside(make, write_space):
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS)
    run_alone(searcher, 12)
    change_space(searcher, NARROW)
    shown = searcher._make_view().visible_trials
    assert [trial.state == TrialState.FAIL for trial in shown] == [not trial.params for trial in searcher.study.trials]
    assert {trial.state for trial in shown if trial.params} <= {TrialState.COMPLETE, TrialState.PRUNED}
    searcher.suggest(12)
    assert searcher.explain_suggestion(12).startswith(
        "TPESampler" if sum(bool(trial.params) for trial in shown) >= 4 else "a random start-up trial of TPESampler"
    )


def test_a_trial_whose_space_had_fewer_parameters_counts_with_their_default_values(make, write_space):
    searcher = make(write_space(WITHOUT_DEPTH), TPE, defaults=DEFAULTS)
    before = run_alone(searcher, 5)
    change_space(searcher, NUMBERS)
    for params, trial in zip(before, searcher.study.trials, strict=True):
        assert trial.params == {**params, "model.decoder.depth": 3}
        assert get_trial_params(trial) == params
        assert get_placed_params(trial) == {**params, "model.decoder.depth": 3}
    change_space(searcher, WITHOUT_DEPTH)
    assert not any(PLACED_ATTRIBUTE in trial.user_attrs for trial in searcher.study.trials)
    assert [trial.params for trial in searcher.study.trials] == before


def test_a_space_that_is_narrowed_and_widened_again_has_all_its_trials_back(make, write_space):
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS)
    run_alone(searcher, 10)
    draws = [trial.params for trial in searcher.study.trials]
    change_space(searcher, NARROW)
    assert [trial.params for trial in searcher.study.trials] != draws
    change_space(searcher, NUMBERS)
    assert [trial.params for trial in searcher.study.trials] == draws


def test_names_that_are_no_keys_are_placed_by_their_draws(make, tmp_path):
    wide, narrow = (OWN_NAMES.replace("LOW", low) for low in ("-5", "-3"))
    searcher = make(read_space(wide), TPE, defaults=DEFAULTS)
    draws = [params["optimizer.lr"] for params in run_alone(searcher, 8)]
    change_space(searcher, narrow)
    assert [bool(trial.params) for trial in searcher.study.trials] == [rate >= 1e-3 for rate in draws]


# --- points to try first ----------------------------------------------------------------------------------------------

POINTS = [{"optimizer.lr": rate, "model.decoder.depth": depth} for rate, depth in [(1e-2, 4), (1e-1, 4), (1e-3, 2)]]


def test_points_to_try_first_remain_if_the_new_space_contains_them(make, write_space):
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS, points_to_evaluate=POINTS)
    searcher.suggest(0)  # the default configuration
    change_space(searcher, NARROW)
    assert [searcher.suggest(number) for number in (1, 2)] == [POINTS[0], POINTS[2]]
    assert searcher.explain_suggestion(2) == "point 3 of searcher.points_to_evaluate"
    searcher.suggest(3)
    assert "points_to_evaluate" not in searcher.explain_suggestion(3)


def test_points_that_were_tried_are_not_tried_again(make, write_space):
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS, points_to_evaluate=POINTS)
    run_on(searcher, 3)
    change_space(searcher, NARROW)
    assert searcher.suggest(3) == POINTS[2]
    assert searcher.suggest(4) not in POINTS


def test_the_most_probable_configuration_of_the_new_prior_is_tried_first(make, write_space):
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS)
    run_on(searcher, 3)
    change_space(searcher, NARROW + "prior:\n  optimizer.lr: 2e-3 +- factor 2\n")
    assert searcher.suggest(3) == {"optimizer.lr": 2e-3, "model.decoder.depth": 3}


# --- finite spaces ----------------------------------------------------------------------------------------------------


def test_a_finite_space_has_the_trials_so_far_and_its_untried_points(make, write_space):
    searcher = make(write_space("optimizer.lr: choice(1e-1, 1e-2)\n"), TPE, defaults=DEFAULTS)
    run_on(searcher, 2)
    assert searcher.num_points == 2
    three = "optimizer.lr: choice(1e-2, 1e-3, 1e-4)\n"
    assert searcher.check_space(read_space(three), list(searcher.snapshots.values())) == 4
    assert searcher.num_points == 2
    change_space(searcher, three)
    assert searcher.num_points == 4
    assert sorted(params["optimizer.lr"] for params in run_on(searcher, 2)) == [1e-4, 1e-3]
    with pytest.raises(UserError, match=r"every configuration of .* has been tried"):
        searcher.check_space(read_space("optimizer.lr: choice(1e-2, 1e-3)\n"), list(searcher.snapshots.values()))
    change_space(searcher, NUMBERS)
    assert searcher.num_points is None


def test_an_added_configuration_must_lie_in_the_new_space(make, write_space):
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS)
    searcher.check_point({"optimizer.lr": 5e-2})
    run_on(searcher, 2)
    change_space(searcher, NARROW)
    with pytest.raises(UserError, match="out of range"):
        searcher.check_point({"optimizer.lr": 5e-2})
    assert searcher.suggest_point(2, {"optimizer.lr": 5e-3}) == {"optimizer.lr": 5e-3, "model.decoder.depth": 3}


@pytest.mark.parametrize(
    ("text", "sampler", "to", "match"),
    [
        (GRID, None, NARROW, "searcher=grid"),
        (NUMBERS, SAMPLERS["gp"], "optimizer.lr: range(0, 1, 1e-6)\n", "searcher=gp lists the 1000000 values"),
        (NUMBERS, TPE, "def space(trial):\n    raise ValueError('no')\n", "raised ValueError: no"),
    ],
)
def test_a_space_that_a_sampler_cannot_search_is_refused(make, write_space, text, sampler, to, match):
    searcher = make(write_space(text), sampler, defaults=DEFAULTS)
    with pytest.raises(UserError, match=match):
        searcher.check_space(read_space(to), [])
    assert searcher.study.study_name == "test"


# --- crashes ----------------------------------------------------------------------------------------------------------

CHANGES = {
    "space": [NARROW],
    "epochs, space": [9, NARROW],
    "space, epochs": [NARROW, 9],
    "epochs, space, epochs, space": [9, NARROW, 27, WITH_SIGMA],
    "spaces": [NARROW, OTHER_CHOICES, CONDITIONAL],
}


def change(searcher, what):
    raise_epochs(searcher, what) if isinstance(what, int) else change_space(searcher, what)


def replay(searcher, changes, snapshots):
    """What a resumed sweep does: it repeats the commands, and then restores all trials."""
    for num_trials, what in changes:
        if isinstance(what, int):
            searcher.on_max_epochs(what)
        else:
            searcher.on_space(read_space(what), list(snapshots.values())[:num_trials])
    searcher.restore_trials(list(snapshots.values()))


@pytest.mark.parametrize("order", CHANGES)
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_resumed_sweep_proposes_the_same(make, write_space, order, is_lost):
    """is_lost: the study is lost, and is made again from the events."""
    space, changes = write_space(NUMBERS), []
    whole, begun = (make(space, TPE, folder=folder, defaults=DEFAULTS) for folder in ("whole", "begun"))
    for what in CHANGES[order]:
        changes.append((len(begun.snapshots) + 4, what))
        for searcher in (whole, begun):
            run_on(searcher, 4)
            change(searcher, what)
    names = [each.study_name for each in whole._storage.get_all_studies()]
    assert len(set(names)) == len(names) == 1 + len(changes)
    begun.close()
    resumed = make(space, TPE, folder="lost" if is_lost else "begun", resume=True, defaults=DEFAULTS)
    resumed.snapshots = dict(begun.snapshots)
    replay(resumed, changes, begun.snapshots)
    assert resumed.study.study_name == whole.study.study_name
    assert resumed.num_points == whole.num_points
    if is_lost:  # where the trials came from, and what a sampler kept, is not in the snapshots
        kept = ("params", "distributions", "state", "values")
        ours, theirs = (
            [{name: trial[name] for name in kept} for trial in read_study(searcher)] for searcher in (whole, resumed)
        )
        assert ours == theirs
    else:
        assert read_study(resumed) == read_study(whole)
    assert run_on(resumed, 3) == run_on(whole, 3)


@pytest.mark.parametrize("num_stored", [0, 1, 4, 7])
def test_a_sweep_that_is_killed_while_its_study_is_copied_copies_it_again(make, write_space, num_stored):
    space = write_space(NUMBERS)
    whole, killed = (make(space, TPE, folder=folder, defaults=DEFAULTS) for folder in ("whole", "killed"))
    for searcher in (whole, killed):
        run_alone(searcher, 8)
    change_space(whole, NARROW)
    with killed_after_trials(killed, num_stored):
        change_space(killed, NARROW)
    resumed = make(space, TPE, folder="killed", resume=True, defaults=DEFAULTS)
    resumed.snapshots = dict(killed.snapshots)
    replay(resumed, [(8, NARROW)], killed.snapshots)
    assert read_study(resumed) == read_study(whole)
    assert resumed.suggest(8) == whole.suggest(8)


def test_a_proposal_that_no_event_has_is_made_again_from_the_new_space(make, write_space):
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS)
    run_on(searcher, 5)
    searcher.searcher.suggest(5)  # the process is killed before the event is written
    change_space(searcher, "optimizer.lr: interval(0.5, 0.6)\n")
    assert len(searcher.study.trials) == 5
    assert 0.5 <= searcher.suggest(5)["optimizer.lr"] <= 0.6


def test_a_database_may_hold_all_studies(make, write_space, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    searcher = make(write_space(NUMBERS), TPE, defaults=DEFAULTS, storage=url)
    run_on(searcher, 5)
    change_space(searcher, OTHER_CHOICES)
    run_on(searcher, 3)
    names = {each.study_name for each in open_storage(url, tmp_path).get_all_studies()}
    assert names == {"test", "test (search space 2)"}
