"""The sentences about reasons."""

import pytest

from handpose.report.reasons import _FORMATTERS, format_close_reason, format_reason
from handpose.schedulers.reason import Reason

METRIC = "val/pa_mpjpe_mm"

SENTENCES = [
    (
        Reason("rung", 19.9, 17.8, rank=4, num_compared=5),
        "stop",
        "rung at epoch 3: PA-MPJPE 19.90 mm, worse than the cutoff 17.80, rank 4 of 5",
    ),
    (
        Reason("rung", 12.3, 17.8, rank=1, num_compared=5),
        "continue",
        "rung at epoch 3: PA-MPJPE 12.30 mm, within the cutoff 17.80, rank 1 of 5",
    ),
    (
        Reason("rung", 12.3, rank=1, num_compared=1),
        "continue",
        "rung at epoch 3: PA-MPJPE 12.30 mm, the first trial there",
    ),
    (
        Reason("rung", 12.3, rank=3, num_compared=6, num_passing=2),
        "pause",
        "rung at epoch 3: PA-MPJPE 12.30 mm, rank 3 of 6, and the best 2 pass",
    ),
    (
        Reason("rung", 12.3, rank=2, num_compared=6, num_passing=2),
        "pause",
        "rung at epoch 3: PA-MPJPE 12.30 mm, rank 2 of 6, and the best 2 pass, another one first",
    ),
    (
        Reason("rung", 12.3, rank=1, num_compared=3, num_passing=1),
        "resume",
        "rung at epoch 3: PA-MPJPE 12.30 mm, rank 1 of 3, and the best one passes",
    ),
    (
        Reason("rung", 12.3, rank=1, num_compared=2, num_passing=0),
        "pause",
        "rung at epoch 3: PA-MPJPE 12.30 mm, rank 1 of 2, too few for one to pass",
    ),
    (
        Reason("pareto_rung", 12.3, num_compared=9, num_passing=3),
        "stop",
        "rung at epoch 3: PA-MPJPE 12.30 mm, by accuracy and cost one of 9, and not among the best 3, which pass",
    ),
    (
        Reason("last_rung", 12.3, rank=1, num_compared=2, num_passing=0),
        "resume",
        "rung at epoch 3: PA-MPJPE 12.30 mm, the best of the paused trials, and nothing else is left to train",
    ),
    (
        Reason("median", 12.3, 11.0, num_compared=6),
        "stop",
        "epoch 3: at best PA-MPJPE 12.30 mm, worse than 11.00, the median of the means of 5 other trials",
    ),
    (
        Reason("population", 12.3, rank=8, num_compared=8, num_passing=6),
        "pause",
        "epoch 3: PA-MPJPE 12.30 mm, rank 8 of 8 in the population, and the worst 2 copy a better trial",
    ),
    (
        Reason("worth", 12.3, rank=3, num_compared=41),
        "pause",
        "epoch 3: expected to end at PA-MPJPE 12.30 mm; 2 of 40 others, paused or new, are worth enough more to be "
        "trained instead",
    ),
    (
        Reason("worth", 12.3, rank=2, num_compared=2),
        "continue",
        "epoch 3: expected to end at PA-MPJPE 12.30 mm; 1 of 1 others, paused or new, is worth enough more to be "
        "trained instead",
    ),
    (
        Reason("worth", 12.3, rank=1, num_compared=5),
        "continue",
        "epoch 3: expected to end at PA-MPJPE 12.30 mm; none of 4 others, paused or new, is worth enough more to be "
        "trained instead",
    ),
    (
        Reason("worth", 12.3, rank=1, num_compared=1),
        "resume",
        "epoch 3: expected to end at PA-MPJPE 12.30 mm; nothing else is left to train",
    ),
    (Reason("turn"), "pause", "the turn of another trial of the population"),
    (Reason("turn"), "resume", "its turn in the population"),
    (Reason("max_epochs", cutoff=27), "complete", "trained to sweep.max_epochs=27"),
    (Reason("not_finite"), "diverged", "epoch 3: PA-MPJPE is not finite"),
    (
        Reason("divergence_factor", 130.0, 120.0),
        "diverged",
        "epoch 3: PA-MPJPE 130.00 mm, beyond 120.00, which sweep.divergence_factor allows after its best value",
    ),
    (
        Reason("cost_limit", 5.2, 4.5, subject="latency_ms"),
        "infeasible",
        "latency 5.2 ms, above the limit 4.5 (searcher.constraints.latency_ms)",
    ),
    (Reason("cost_limit", subject="latency_ms"), "infeasible", "latency ms could not be measured"),
    (Reason("retries", 1, 2), "retry", "failure 1 of the trial, and sweep.max_retries=2 allows a retry"),
    (Reason("retries", 3, 2), "no_retry", "failure 3 of the trial, and sweep.max_retries=2 allows no further retry"),
    (Reason("gpu_share", 0.5, 0.25), "retry", "it gets 0.5 of a GPU instead of 0.25"),
    (Reason("halt", 3), "retry", "the sweep is halted: 3 trials failed before any had reported"),
    (Reason("blameless"), "retry", "not the trial's fault, so it does not count as a retry"),
    (None, "stop", ""),
]


@pytest.mark.parametrize(("reason", "outcome", "sentence"), SENTENCES)
def test_a_reason_is_one_sentence_with_its_numbers(reason, outcome, sentence):
    assert format_reason(reason, METRIC, outcome=outcome, epoch=3) == sentence


def test_values_that_would_look_equal_have_more_digits():
    reason = Reason("rung", 12.341, 12.339, rank=2, num_compared=2)
    sentence = "rung at epoch 1: PA-MPJPE 12.341 mm, worse than the cutoff 12.339, rank 2 of 2"
    assert format_reason(reason, METRIC, outcome="stop", epoch=1) == sentence
    nearly = Reason("rung", 12.300000000000002, 12.3, rank=2, num_compared=2)
    assert "12.300000000000002 mm, worse than the cutoff 12.3" in format_reason(nearly, METRIC, outcome="stop", epoch=1)


@pytest.mark.parametrize("rule", ["below half", *_FORMATTERS])
def test_a_scheduler_of_a_user_may_give_any_rule_with_any_numbers(rule):
    """A name that a scheduler of this project uses, but without its numbers, is no mistake."""
    assert format_reason(Reason(rule), METRIC, outcome="stop", epoch=1)
    assert format_reason(Reason(rule, rank=2), METRIC, outcome="stop", epoch=1)


def test_what_a_scheduler_of_a_user_compared_is_listed():
    reason = Reason("worse than half of them", 12.3, 11.0, rank=5, num_compared=8, num_passing=4)
    expected = "epoch 2: worse than half of them, PA-MPJPE 12.30 mm, cutoff 11.00, rank 5 of 8, the best 4 pass"
    assert format_reason(reason, METRIC, outcome="stop", epoch=2) == expected


def test_why_a_sweep_was_closed_names_the_budget():
    assert format_close_reason("spent", Reason("sweep.gpu_hours", 2.3, 2.0)) == "sweep.gpu_hours=2 is spent"
    assert format_close_reason("spent", None) == "a budget is spent"
    assert format_close_reason("interrupted", None) == "the sweep was interrupted"
