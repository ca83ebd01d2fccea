"""Advice, on sweeps whose truth is known, and the space file for the next round."""

import math
import random

import pytest

from handpose.report.advice import advice, advice_text
from handpose.report.next_space import next_space
from handpose.report.ranges import LEAST_TRIALS, crowded_edges, settled_span, widened
from handpose.report.record import Candidate, Confirmation, Effect, Importance, Interval, Parameter
from handpose.sweep.space import ListedSpace, load_space
from tests.report.records import DEPTH, HEAD, RATE, SCALE, record, swept, trial


def answers(made, question):
    return [finding for finding in advice(made) if question in finding.question]


def loaded(text, folder):
    file = folder / "next_space.yaml"
    file.write_text(text)
    space = load_space(str(file))
    assert isinstance(space, ListedSpace)
    return space


def test_an_edge_that_the_best_trials_crowd_is_found_with_a_wider_range_to_paste(tmp_path):
    made = swept(lambda params: 10 - math.log10(params["optimizer.lr"]), [RATE, SCALE])
    (found,) = answers(made, "edge")
    assert found.kind == "act"
    assert "upper end of optimizer.lr" in found.text
    wider = loaded(found.paste, tmp_path).parameters["optimizer.lr"]
    assert wider.log
    assert wider.low == 1e-4
    assert wider.high == pytest.approx(0.1 * 10**1.5, rel=0.1)


def test_an_optimum_inside_of_the_range_is_no_edge():
    made = swept(lambda params: abs(math.log10(params["optimizer.lr"]) + 2.5), [RATE, SCALE])
    assert [finding.kind for finding in answers(made, "edge")] == ["fine"]


def test_zero_is_the_natural_end_of_a_range():
    made = swept(lambda params: params["augment.scale"], [SCALE])
    assert not crowded_edges(made, shown_effects(made))


def test_the_last_of_a_few_whole_numbers_is_an_edge():
    made = swept(lambda params: 10 - params["model.decoder.depth"] + params["augment.scale"], [DEPTH, SCALE])
    (found,) = answers(made, "edge")
    assert found.paste == "model.decoder.depth: range(1, 8)"


@pytest.mark.parametrize("is_upper", [False, True])
@pytest.mark.parametrize("parameter", [RATE, DEPTH, SCALE, Parameter("x", "int", 16, 256, log=True)])
def test_a_wider_range_holds_the_one_before(parameter, is_upper):
    low, high = widened(parameter, is_upper=is_upper)
    assert low <= parameter.low
    assert parameter.high <= high
    assert (high > parameter.high) if is_upper else (low < parameter.low or parameter.low <= 1)


def test_noise_is_rarely_taken_for_an_edge_or_for_settled():
    draws = random.Random(1)
    alarms = 0
    for seed in range(100):
        made = swept(lambda params: draws.gauss(0, 1), [RATE, SCALE, DEPTH, HEAD], seed=seed, num_trials=40)
        alarms += bool(crowded_edges(made, shown_effects(made))) or any(settled_span(made, each) for each in made.parameters)
    assert alarms <= 10  # edges and settled ranges at 5 % each


def test_nothing_is_said_of_ranges_with_too_few_trials():
    made = swept(lambda params: -params["optimizer.lr"], [RATE], num_trials=LEAST_TRIALS - 1)
    assert {finding.kind for finding in answers(made, "edge") + answers(made, "settled")} == {"open"}
    assert next_space(made) is None


def test_a_settled_parameter_is_narrowed_round_the_best_and_the_file_loads(tmp_path):
    made = swept(lambda params: abs(params["augment.scale"] - 0.2), [SCALE, RATE])
    assert any("augment.scale is settled" in finding.text for finding in answers(made, "settled"))
    text = next_space(made)
    space = loaded(text, tmp_path)
    narrow = space.parameters["augment.scale"]
    assert 0.1 < narrow.low < 0.2 < narrow.high < 0.3
    assert space.expressions["optimizer.lr"] == RATE.expression


def test_a_settled_choice_is_fixed(tmp_path):
    made = swept(
        lambda params: (params["model.decoder.head"] == "axes") + params["augment.scale"], [HEAD, SCALE], num_trials=80
    )
    space = loaded(next_space(made), tmp_path)
    assert space.fixed == {"model.decoder.head": "heatmaps"}


def test_the_next_round_of_a_conditional_space_is_of_the_winners_branch(tmp_path):
    family = Parameter("model/decoder", "choice", choices=["pyramid", "effpose"])
    depth = Parameter("model.decoder.depth", "int", 1, 5, step=1, is_conditional=True)
    trials = []
    for number in range(30):
        params = {"model/decoder": "effpose", "optimizer.lr": 1e-3}
        if number % 2:
            params = {"model/decoder": "pyramid", "optimizer.lr": 1e-3, "model.decoder.depth": 1 + number % 5}
        trials.append(trial(number, params, [9.0, 8.0, 7.0, 6.0 - number % 2 + 0.01 * number]))
    made = record(trials, [family, depth, RATE])
    space = loaded(next_space(made), tmp_path)
    assert space.fixed["model/decoder"] == "pyramid"
    assert set(space.parameters) <= {"model.decoder.depth", "optimizer.lr"}


def test_a_best_trial_without_neighbours_is_told():
    lonely = [trial(0, {"optimizer.lr": 1e-4}, [1.0] * 4)]
    others = [trial(number, {"optimizer.lr": 0.05}, [5.0 + number] * 4) for number in range(1, 20)]
    assert answers(record(lonely + others, [RATE]), "near the best")[0].kind == "act"
    near = [trial(number, {"optimizer.lr": 1.2e-4}, [2.0 + number] * 4) for number in range(1, 20)]
    assert answers(record(lonely + near, [RATE]), "near the best")[0].kind == "fine"


def test_what_sets_trials_apart_that_came_to_nothing_is_told():
    draws = random.Random(0)
    trials = []
    for number in range(40):
        rate = RATE.value_at(draws.random())
        state = "diverged" if rate > 0.02 else "complete"
        values = [math.nan] if state == "diverged" else [3.0, 2.0, 1.0, 1.0]
        head = draws.choice(["heatmaps", "axes"])
        trials.append(trial(number, {"optimizer.lr": rate, "model.decoder.head": head}, values, state=state))
    (found,) = answers(record(trials, [RATE, HEAD]), "nothing")
    assert found.kind == "act"
    assert "larger optimizer.lr" in found.text


def test_a_choice_under_which_trials_cost_too_much_is_told():
    kinds = ["axes" if number % 2 else "heatmaps" for number in range(20)]
    trials = [
        trial(number, {"model.decoder.head": kind}, [] if kind == "axes" else [1.0] * 4, state=state)
        for number, kind in enumerate(kinds)
        for state in ["infeasible" if kind == "axes" else "complete"]
    ]
    (found,) = answers(record(trials, [HEAD]), "nothing")
    assert "model.decoder.head axes more often: 10 of these 10, 0 of the other 10" in found.text


@pytest.mark.parametrize(
    ("curve", "question", "kind"),
    [
        ([9, 5, 4, 4.5, 5, 6, 6.5, 7], "get worse again", "act"),
        ([9, 5, 4, 3.9, 3.8, 3.8, 3.8, 3.8], "get worse again", "fine"),
        ([9, 8, 7, 6, 5, 4, 3, 2], "still improve", "note"),
        ([9, 5, 4, 4, 4, 4, 4, 4], "still improve", "fine"),
    ],
)
def test_the_end_of_the_best_curves_is_judged(curve, question, kind):
    trials = [trial(number, {}, [value + 0.01 * number for value in curve]) for number in range(6)]
    (found,) = answers(record(trials, max_epochs=8), question)
    assert found.kind == kind


def test_the_end_of_the_curves_is_judged_the_other_way_round_where_more_is_better():
    trials = [trial(number, {}, [0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]) for number in range(6)]
    made = record(trials, max_epochs=8, mode="max")
    assert answers(made, "get worse again")[0].kind == "fine"
    assert answers(made, "still improve")[0].kind == "note"


def test_late_divergence_is_told_from_early_one():
    late = [trial(number, {}, [3.0, 2.0, 2.0, math.nan], state="diverged") for number in range(3)]
    early = [trial(number, {}, [math.nan], state="diverged") for number in range(3)]
    assert answers(record(late), "diverge late")[0].kind == "act"
    assert answers(record(early), "diverge late")[0].kind == "fine"


@pytest.mark.parametrize(("order", "kind"), [(1, "fine"), (-1, "act")])
def test_rungs_that_rank_otherwise_than_the_end_are_told(order, kind):
    trials = [trial(number, {}, [10.0 + order * number, 5.0, 4.0, 1.0 + number]) for number in range(10)]
    assert answers(record(trials, rungs=(1,)), "rungs")[0].kind == kind


def test_no_effect_is_claimed_only_with_enough_trials():
    effect = Effect("augment.scale", 0.01, 0.0, 0.05, 0.1)
    for num_trials, is_told in ((30, False), (50, True)):
        made = swept(lambda params: params["optimizer.lr"], [RATE, SCALE], num_trials=50)
        made = record(made.trials, made.parameters, importance=[Importance(4, num_trials, 5, [effect])])
        assert any("No effect" in finding.text for finding in advice(made)) == is_told


def confirmed(*distinguishable, difference=1.0, unknown=None):
    """A confirmation of trial 1, the winner, beside trials of which it can be told apart, or not, or neither."""
    between = Interval(difference, difference - 0.1, difference + 0.1)
    candidates = [
        Candidate(f"trial {number}", number, {}, {1: 1.0}, between, None if number == 1 else between, each)
        for number, each in enumerate((None, *distinguishable), start=1)
    ]
    return Confirmation(4, [1, 2], candidates, candidates[0], None, "", unknown=unknown or {})


def trust(confirmation):
    trials = [trial(number, {}, [1.0] * 4) for number in range(1, 4)]
    (found,) = answers(record(trials, confirmation=confirmation), "trusted")
    return found


def test_what_the_confirmation_cannot_tell_apart_is_said():
    found = trust(confirmed(False, True))
    assert "not distinguishable from trial 2." in found.text


def test_a_winner_is_trusted_only_over_what_it_was_shown_to_be_better_than():
    found = trust(confirmed(True, None))
    assert (found.kind, found.text) == ("fine", "Trial 1 is better than trial 2 over fresh seeds.")
    assert trust(confirmed(True, difference=-1.0)).kind == "note"  # the default, which costs too much


@pytest.mark.parametrize("distinguishable", [(), (None,), (None, None)])
def test_without_evidence_nothing_is_claimed_of_the_winner(distinguishable):
    found = trust(confirmed(*distinguishable, unknown={"not_distinguishable_from": "one seed shows nothing"}))
    assert found.kind == "open"
    assert found.text.endswith("whether it is better than the others is unknown: one seed shows nothing.")
    assert "unknown" in trust(confirmed(*distinguishable)).text  # a file of an earlier version has no reason


def test_the_terminal_has_what_is_to_be_done_with_its_evidence():
    made = swept(lambda params: 10 - math.log10(params["optimizer.lr"]), [RATE])
    text = advice_text(advice(made))
    assert "optimizer.lr: tag(log, interval(" in text
    assert "of the 6 best lie at or near 0.1" in text


def test_a_sweep_that_has_just_begun_gets_no_advice_but_openness():
    assert all(finding.kind in ("open", "fine") for finding in advice(record([])))
