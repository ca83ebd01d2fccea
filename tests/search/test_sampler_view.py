import optuna
import pytest
from optuna.samplers._tpe.sampler import _split_trials
from optuna.trial import TrialState, create_trial

from handpose.search.sampler_view import show_trials

RANGE = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


def make_trial(number, *, over):
    """Complete, stopped, failed, waiting or running, and in two of nine over a limit where over is given."""
    kind, value = number % 9, float((number * 7919) % 1009)
    state = {6: TrialState.FAIL, 7: TrialState.WAITING, 8: TrialState.RUNNING}.get(
        kind, TrialState.COMPLETE if kind < 3 else TrialState.PRUNED
    )
    steps = {} if state in (TrialState.FAIL, TrialState.RUNNING) else {1: 2000.0, 1 + kind: value}
    return create_trial(
        state=state,
        value=value if state in (TrialState.COMPLETE, TrialState.PRUNED) else None,
        params={"x": number / 1000},
        distributions=RANGE,
        intermediate_values=steps,
        system_attrs={"constraints:memory_mb": 0.1 * kind if kind in (1, 4) else -0.1} if over else {},
    )


@pytest.fixture(params=[("minimize", False), ("maximize", False), ("minimize", True)], ids=str)
def study(request):
    direction, over = request.param
    study = optuna.create_study(direction=direction)
    study.add_trials([make_trial(number, over=over) for number in range(900)])
    return study


def shown(study, max_ended):
    return show_trials(study.trials, study.direction, constraints=study.trials[0].constraints, max_ended=max_ended)


def select_ended(trials):
    return [each for each in trials if each.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def test_of_many_ended_trials_a_tenth_shown_are_the_best_and_the_others_the_newest(study):
    all_ended, some = select_ended(shown(study, None)), select_ended(shown(study, 300))
    # The waiting trials count as stopped ones, where they have reported; the oracle is TPE's own ranking.
    best, _ = _split_trials(study, all_ended, 30)
    assert {each.number for each in best} <= {each.number for each in some}
    newest = [each.number for each in all_ended if each.number not in {good.number for good in best}][-270:]
    assert sorted([each.number for each in some]) == sorted([*newest, *(each.number for each in best)])


def test_tpe_takes_the_same_trials_for_good(study):
    few, all_of_them = (_split_trials(study, select_ended(shown(study, limit)), 25)[0] for limit in (300, None))
    assert [each.number for each in few] == [each.number for each in all_of_them]


def test_trials_that_have_not_ended_are_all_shown_and_the_order_stays(study):
    trials = shown(study, 300)
    assert [each.number for each in trials] == sorted(each.number for each in trials)
    assert sum(each.state == TrialState.RUNNING for each in trials) == 100


def test_up_to_the_bound_nothing_is_left_out(study):
    assert len(shown(study, 900)) == 900
