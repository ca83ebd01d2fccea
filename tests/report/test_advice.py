"""Advice, on sweeps whose truth is known, and the space file for the next round."""

import math
import random

import pytest
from optuna.distributions import IntDistribution

from handpose.report.advice import format_advice, give_advice
from handpose.report.effects import MIN_EFFECT_TRIALS, find_shown_effects
from handpose.report.next_space import suggest_next_space
from handpose.report.ranges import find_crowded_edges, find_settled_parameters, format_range, widen_range
from handpose.report.sweep_record import Candidate, Confirmation, Interval, Parameter
from handpose.search.distributions import fit_value
from handpose.search.space import YamlSpace, load_space
from tests.report.fabricated_records import DEPTH, HEAD, RATE, SCALE, make_record, make_swept_record, make_trial


def find_answers(made, question):
    return [finding for finding in give_advice(made) if question in finding.question]


def load_text(text, folder):
    file = folder / "next_space.yaml"
    file.write_text(text)
    space = load_space(str(file))
    assert isinstance(space, YamlSpace)
    return space


def test_an_edge_that_the_best_trials_crowd_is_found_with_a_wider_range_to_paste(tmp_path):
    made = make_swept_record(lambda params: 10 - math.log10(params["optimizer.lr"]), [RATE, SCALE])
    (found,) = find_answers(made, "edge")
    assert found.kind == "act"
    assert "upper end of optimizer.lr" in found.text
    wider = load_text(found.paste, tmp_path).parameters["optimizer.lr"]
    assert wider.log
    assert wider.low == 1e-4
    assert wider.high == pytest.approx(0.1 * 10**1.5, rel=0.1)


def test_an_optimum_inside_of_the_range_is_no_edge():
    made = make_swept_record(lambda params: abs(math.log10(params["optimizer.lr"]) + 2.5), [RATE, SCALE])
    assert [finding.kind for finding in find_answers(made, "edge")] == ["fine"]


def test_zero_is_the_natural_end_of_a_range():
    made = make_swept_record(lambda params: params["augment.scale"], [SCALE])
    assert not find_crowded_edges(made, find_shown_effects(made))


def test_the_last_of_a_few_whole_numbers_is_an_edge():
    made = make_swept_record(
        lambda params: 10 - params["model.decoder.depth"] + params["augment.scale"], [DEPTH, SCALE]
    )
    (found,) = find_answers(made, "edge")
    assert found.paste == "model.decoder.depth: range(1, 8)"


@pytest.mark.parametrize("is_upper", [False, True])
@pytest.mark.parametrize("parameter", [RATE, DEPTH, SCALE, Parameter("x", "int", 16, 256, log=True)])
def test_a_wider_range_holds_the_one_before(parameter, is_upper):
    low, high = widen_range(parameter, is_upper=is_upper)
    assert low <= parameter.low
    assert parameter.high <= high
    assert (high > parameter.high) if is_upper else (low < parameter.low or parameter.low <= 1)


@pytest.mark.parametrize("is_upper", [False, True])
@pytest.mark.parametrize(
    "parameter",
    [
        Parameter("x", "float", 0.5, 0.502),
        Parameter("x", "float", -3.14159, 2.71828),
        Parameter("x", "float", 1.23456e-4, 0.0987654, log=True),
        Parameter("x", "float", 0.15, 3.15, step=0.5),
        Parameter("x", "float", 0.0, 4.0, step=2.0),
        Parameter("x", "float", 1234567.0, 1234587.0, step=1.0),
        Parameter("x", "float", 1e-300, 1e300, log=True),
        Parameter("x", "int", 1000, 1010, step=1),
        Parameter("x", "int", 12345, 67891, log=True),
        Parameter("x", "int", 32, 144, step=16),
        Parameter("x", "int", 0, 2**53 - 1, step=1),
    ],
)
def test_a_wider_range_is_a_space_with_every_value_of_the_one_before(parameter, is_upper, tmp_path):
    wider = load_text(
        f"x: {format_range(parameter, *widen_range(parameter, is_upper=is_upper))}\ny: range(0, 2)", tmp_path
    )
    distribution = wider.parameters["x"]
    assert distribution.log == parameter.log
    assert isinstance(distribution, IntDistribution) == (parameter.kind == "int")
    for value in (parameter.low, parameter.low + (parameter.step or 0), parameter.high):
        assert fit_value(value, distribution) == pytest.approx(value, rel=1e-15)


def test_a_range_is_not_narrowed_by_rounding(tmp_path):
    """Two digits do not tell the ends of this range apart."""
    narrow = Parameter("x", "float", 0.5, 0.502)
    made = make_swept_record(lambda params: abs(params["x"] - 0.5012), [narrow, SCALE], num_trials=80)
    (known,) = find_settled_parameters(made, find_shown_effects(made))
    assert "is best between" in known.summary
    found = load_text(suggest_next_space(made), tmp_path).parameters["x"]
    assert 0.5 < found.low <= known.low < 0.5012 < known.high <= found.high < 0.502


def test_an_end_that_is_not_ruled_out_is_not_named_as_a_bound():
    """The logarithm and back changes the last digit."""
    rate = Parameter("x", "float", 1.23456e-4, 0.0987654, log=True)
    made = make_swept_record(lambda params: rate.to_place(params["x"]), [rate, SCALE], num_trials=80)
    (known,) = find_settled_parameters(made, find_shown_effects(made))
    assert known.low == rate.low
    assert "or below" in known.summary


def test_lists_with_values_that_python_considers_equal_are_told_apart(tmp_path):
    lists = Parameter("x", "choice", choices=[[1, True], [1, 1]])
    made = make_swept_record(
        lambda params: float(params["x"][1] is True) + params["augment.scale"], [lists, SCALE], num_trials=80
    )
    assert str(load_text(suggest_next_space(made), tmp_path).fixed["x"]) == "[1, 1]"


@pytest.mark.parametrize(
    ("key", "high"), [("augment.rotation_deg", 180.0), ("lr_schedule.flat", 0.8), ("augment.perspective_deg", 40.0)]
)
def test_a_range_is_not_widened_to_what_a_configuration_does_not_take(key, high):
    parameter = Parameter(key, "float", 0.2, high)
    assert widen_range(parameter, is_upper=True) == (0.2, high)
    made = make_swept_record(lambda params: -params[key] / high, [parameter, SCALE])
    assert not find_crowded_edges(made, find_shown_effects(made))


def test_an_end_that_cannot_be_moved_is_no_edge():
    """A depth of 1 is the least that `widen_range` proposes."""
    made = make_swept_record(lambda params: params["model.decoder.depth"] + params["augment.scale"], [DEPTH, SCALE])
    assert not find_crowded_edges(made, find_shown_effects(made))


def test_noise_is_rarely_taken_for_anything():
    draws = random.Random(1)
    alarms = 0
    for seed in range(100):
        made = make_swept_record(
            lambda params: draws.gauss(15, 1), [RATE, SCALE, DEPTH, HEAD], seed=seed, num_trials=40
        )
        claims = [each for each in give_advice(made) if each.kind in ("act", "note") and "trusted" not in each.question]
        alarms += bool(claims) or suggest_next_space(made) is not None
    assert alarms <= 5  # 1 % are meant; six or more of 100 have a probability of 0.0005 then


def test_where_nothing_is_shown_it_is_left_open():
    draws = random.Random(0)
    made = make_swept_record(lambda params: draws.gauss(0, 1), [RATE, SCALE], num_trials=40)
    assert {finding.kind for finding in find_answers(made, "edge") + find_answers(made, "near the best")} == {"open"}
    assert all(
        "no effect" not in finding.text.lower() or "does not mean" in finding.text for finding in give_advice(made)
    )


def test_nothing_is_said_of_ranges_with_too_few_trials():
    made = make_swept_record(lambda params: -params["optimizer.lr"], [RATE], num_trials=MIN_EFFECT_TRIALS - 1)
    assert {finding.kind for finding in find_answers(made, "edge") + find_answers(made, "matter, and where")} == {
        "open"
    }
    assert suggest_next_space(made) is None


def test_a_range_is_narrowed_to_where_the_best_value_lies_and_the_file_loads(tmp_path):
    made = make_swept_record(lambda params: abs(params["augment.scale"] - 0.2), [SCALE, RATE], num_trials=100)
    (known,) = [each for each in find_answers(made, "matter, and where") if each.kind == "note"]
    assert "augment.scale is best between" in known.text
    text = suggest_next_space(made)
    space = load_text(text, tmp_path)
    narrow = space.parameters["augment.scale"]
    assert 0.05 < narrow.low < 0.2 < narrow.high < 0.35
    assert space.expressions["optimizer.lr"] == RATE.expression
    (line,) = [line for line in text.splitlines() if line.startswith("augment.scale")]
    assert "trials at epoch 4, p = " in line


def test_a_range_that_is_narrowed_always_holds_the_winner_and_the_best_trials(tmp_path):
    for seed in range(10):
        draws = random.Random(seed)
        made = make_swept_record(
            lambda params: 4 * abs(RATE.to_place(params["optimizer.lr"]) - 0.3) + draws.gauss(0, 0.5),  # noqa: B023
            [RATE, SCALE],
            seed=seed,
        )
        for known in find_settled_parameters(made, find_shown_effects(made)):
            best = [each.params["optimizer.lr"] for each in made.list_leading_trials(6)]
            assert known.low <= min(best)
            assert max(best) <= known.high
            space = load_text(suggest_next_space(made), tmp_path)
            assert space.parameters["optimizer.lr"].low <= known.low
            assert space.parameters["optimizer.lr"].high >= known.high


def test_a_settled_choice_is_fixed(tmp_path):
    made = make_swept_record(
        lambda params: (params["model.decoder.head"] == "axes") + params["augment.scale"], [HEAD, SCALE], num_trials=80
    )
    text = suggest_next_space(made)
    assert load_text(text, tmp_path).fixed == {"model.decoder.head": "heatmaps"}
    assert "axes did worse than heatmaps in 80 trials" in text


def make_conditional_record(branch_matters):
    """Trials of two decoders, one of which has a depth that matters."""
    family = Parameter("model/decoder", "choice", choices=["pyramid", "effpose"])
    depth = Parameter("model.decoder.depth", "int", 1, 5, step=1, is_conditional=True)
    draws, trials = random.Random(0), []
    for number in range(80):
        params = {"model/decoder": draws.choice(["pyramid", "effpose"]), "optimizer.lr": RATE.to_value(draws.random())}
        value = draws.gauss(0, 0.1)
        if params["model/decoder"] == "pyramid":
            params["model.decoder.depth"] = draws.randint(1, 5)
            value += 0.5 * params["model.decoder.depth"] - 1.5 - 3 * branch_matters
        trials.append(make_trial(number, params, [value + 3, value + 2, value + 1, value]))
    return make_record(trials, [family, depth, RATE])


def test_the_next_round_of_a_conditional_space_is_of_the_winners_branch(tmp_path):
    text = suggest_next_space(make_conditional_record(branch_matters=True))
    space = load_text(text, tmp_path)
    assert space.fixed["model/decoder"] == "pyramid"
    assert "effpose did worse than pyramid" in text
    assert set(space.parameters) | set(space.fixed) == {"model/decoder", "model.decoder.depth", "optimizer.lr"}


def test_no_branch_is_left_out_that_is_not_shown_to_be_worse():
    """The depth's effect is shown, but a file of plain ranges would have to leave out the other decoder."""
    made = make_conditional_record(branch_matters=False)
    assert "model.decoder.depth" in [effect.key for effect in find_shown_effects(made)]
    assert suggest_next_space(made) is None


def test_a_best_trial_without_neighbours_is_told():
    """The others lie where the metric is worse, so that the rate is shown to matter."""
    places = [random.Random(number).random() for number in range(40)]

    def made(best):
        others = [
            make_trial(n, {"optimizer.lr": RATE.to_value(0.4 + 0.6 * place)}, [5 + 9 * place] * 4)
            for n, place in enumerate(places)
        ]
        return make_record([*others, make_trial(40, {"optimizer.lr": RATE.to_value(best)}, [1.0] * 4)], [RATE])

    assert find_answers(made(0.0), "near the best")[0].kind == "act"
    assert find_answers(made(0.41), "near the best")[0].kind == "fine"


def test_what_sets_trials_apart_that_came_to_nothing_is_told():
    draws = random.Random(0)
    trials = []
    for number in range(40):
        rate = RATE.to_value(draws.random())
        state = "diverged" if rate > 0.02 else "complete"
        values = [math.nan] if state == "diverged" else [3.0, 2.0, 1.0, 1.0]
        head = draws.choice(["heatmaps", "axes"])
        trials.append(make_trial(number, {"optimizer.lr": rate, "model.decoder.head": head}, values, state=state))
    (found,) = find_answers(make_record(trials, [RATE, HEAD]), "gave no result")
    assert found.kind == "act"
    assert "These trials differ in optimizer.lr: the middle half of them is between" in found.text


def test_a_choice_under_which_trials_cost_too_much_is_told():
    kinds = ["axes" if number % 2 else "heatmaps" for number in range(20)]
    trials = [
        make_trial(number, {"model.decoder.head": kind, "x": number}, [] if kind == "axes" else [1.0] * 4, state=state)
        for number, kind in enumerate(kinds)
        for state in ["infeasible" if kind == "axes" else "complete"]
    ]
    (found,) = find_answers(make_record(trials, [HEAD]), "gave no result")
    assert "model.decoder.head=axes more often: 10 of these 10 trials, 0 of the other 10" in found.text


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
    trials = [make_trial(number, {}, [value + 0.01 * number for value in curve]) for number in range(6)]
    (found,) = find_answers(make_record(trials, max_epochs=8), question)
    assert found.kind == kind


def test_with_folds_the_end_of_the_first_one_is_judged():
    """Later values are means that change only at the end of a fold."""
    curve = [9, 8, 7, 6, 5, 4, 3, 2, *[2] * 7, 2.1]
    trials = [make_trial(number, {}, [value + 0.01 * number for value in curve]) for number in range(6)]
    assert find_answers(make_record(trials, max_epochs=16, folds=2), "still improve")[0].kind == "note"


def test_the_end_of_the_curves_is_judged_the_other_way_round_where_more_is_better():
    trials = [make_trial(number, {}, [0.1, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]) for number in range(6)]
    made = make_record(trials, max_epochs=8, mode="max")
    assert find_answers(made, "get worse again")[0].kind == "fine"
    assert find_answers(made, "still improve")[0].kind == "note"


def test_late_divergence_is_told_from_early_one():
    late = [make_trial(number, {}, [3.0, 2.0, 2.0, math.nan], state="diverged") for number in range(3)]
    early = [make_trial(number, {}, [math.nan], state="diverged") for number in range(3)]
    assert find_answers(make_record(late), "diverge late")[0].kind == "act"
    assert find_answers(make_record(early), "diverge late")[0].kind == "fine"


@pytest.mark.parametrize(("order", "kind"), [(1, "fine"), (-1, "act")])
def test_rungs_that_rank_otherwise_than_the_end_are_told(order, kind):
    trials = [make_trial(number, {}, [10.0 + order * number, 5.0, 4.0, 1.0 + number]) for number in range(10)]
    assert find_answers(make_record(trials, rungs=(1,)), "early rungs")[0].kind == kind


def test_survivors_that_rank_differently_are_no_reason_to_stop_later():
    """Only the best tenth was trained on, and among these the first epoch tells little."""
    draws, calls = random.Random(0), 0
    for _ in range(20):
        first = [draws.gauss(0, 1) for _ in range(80)]
        cut = sorted(first)[8]
        trials = []
        for number, value in enumerate(first):
            last = 0.8 * value + draws.gauss(0, 0.6)
            curve = [20 + value, 15, 12, 10 + last] if value <= cut else [20 + value]
            trials.append(make_trial(number, {}, curve, state="complete" if value <= cut else "stopped"))
        calls += find_answers(make_record(trials, rungs=(1,)), "early rungs")[0].kind == "act"
    assert calls == 0


def test_noise_at_the_end_of_the_curves_is_neither_overfitting_nor_progress():
    """The best trials are those that were lucky at the last epoch, and each curve has a lowest point by chance."""
    draws, found = random.Random(0), []
    for _ in range(40):
        trials = [make_trial(number, {}, [10 + draws.gauss(0, 1) for _ in range(20)]) for number in range(20)]
        made = make_record(trials, max_epochs=20)
        found += [each.kind for each in find_answers(made, "get worse again") + find_answers(made, "still improve")]
    assert found.count("fine") >= 76


def test_trials_that_were_kept_for_their_luck_at_a_rung_do_not_overfit():
    """Flat curves: the third that was the luckiest at epoch 1, and of it the third at epoch 3, is trained on."""
    draws, found = random.Random(0), []
    for _ in range(60):
        curves = [[10 + draws.gauss(0, 1) for _ in range(9)] for _ in range(45)]
        curves.sort(key=lambda curve: curve[0])
        kept = sorted(curves[:15], key=lambda curve: curve[2])
        lengths = [9] * 5 + [3] * 10
        trials = [
            make_trial(number, {}, curve[:length])
            for number, (curve, length) in enumerate(zip(kept, lengths, strict=True))
        ]
        trials += [make_trial(15 + number, {}, curve[:1]) for number, curve in enumerate(curves[15:])]
        (answer,) = find_answers(make_record(trials, max_epochs=9, rungs=(1, 3)), "get worse again")
        found.append(answer.kind)
    assert found.count("act") <= 3


def make_confirmation(*distinguishable, difference=1.0, unknown=None):
    """A confirmation of trial 1, the winner, beside trials of which it can be told apart, or not, or neither."""
    between = Interval(difference, difference - 0.1, difference + 0.1)
    candidates = [
        Candidate(f"trial {number}", number, {}, {1: 1.0}, between, None if number == 1 else between, each)
        for number, each in enumerate((None, *distinguishable), start=1)
    ]
    return Confirmation(4, [1, 2], candidates, candidates[0], None, "", unknown=unknown or {})


def check_trust(confirmation):
    trials = [make_trial(number, {}, [1.0] * 4) for number in range(1, 4)]
    (found,) = find_answers(make_record(trials, confirmation=confirmation), "trusted")
    return found


def test_what_the_confirmation_cannot_tell_apart_is_said():
    found = check_trust(make_confirmation(False, True))
    assert "not distinguishable from trial 2." in found.text


def test_a_winner_is_trusted_only_over_what_it_was_shown_to_be_better_than():
    found = check_trust(make_confirmation(True, None))
    assert (found.kind, found.text) == ("fine", "Trial 1 is better than trial 2 with new seeds.")
    assert check_trust(make_confirmation(True, difference=-1.0)).kind == "note"  # the default, which costs too much


@pytest.mark.parametrize("distinguishable", [(), (None,), (None, None)])
def test_without_evidence_nothing_is_claimed_of_the_winner(distinguishable):
    found = check_trust(
        make_confirmation(*distinguishable, unknown={"not_distinguishable_from": "one seed shows nothing"})
    )
    assert found.kind == "open"
    assert found.text.endswith("it is unknown whether it is better than the others: one seed shows nothing.")
    assert (
        "unknown" in check_trust(make_confirmation(*distinguishable)).text
    )  # a file of an earlier version has no reason


def test_the_terminal_has_what_is_to_be_done_with_its_evidence():
    made = make_swept_record(lambda params: 10 - math.log10(params["optimizer.lr"]), [RATE])
    text = format_advice(give_advice(made))
    assert "optimizer.lr: tag(log, interval(" in text
    assert "of the 6 best trials lie at or near 0.1" in text


def test_a_sweep_that_has_just_begun_gets_no_advice_but_openness():
    assert all(finding.kind in ("open", "fine") for finding in give_advice(make_record([])))


def test_a_number_that_decides_the_branch_is_narrowed_with_its_evidence(tmp_path):
    """Depth 0 has no skips, and is shown to be worse than the others."""
    depth = Parameter("depth", "int", 0, 3, step=1, expression="range(0, 4)")
    skips = Parameter("skips", "choice", choices=["none", "add"], is_conditional=True)
    draws, trials = random.Random(0), []
    for number in range(100):
        params = {"depth": draws.randint(0, 3), "optimizer.lr": RATE.to_value(draws.random())}
        if params["depth"]:
            params["skips"] = draws.choice(["none", "add"])
        trials.append(make_trial(number, params, [30 - 3 * params["depth"] + draws.gauss(0, 0.3)] * 4))
    text = suggest_next_space(make_record(trials, [depth, skips, RATE]))
    (line,) = [line for line in text.splitlines() if line.startswith("depth")]
    assert "p = " in line
    space = load_text(text, tmp_path)
    assert 0 not in ([space.fixed["depth"]] if "depth" in space.fixed else [space.parameters["depth"].low])
