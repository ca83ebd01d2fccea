import re
from itertools import pairwise

import pytest
import torch

from handpose.config import compose, instantiate_key
from handpose.errors import UserError
from handpose.training.schedules import constant, flat_cosine, multistep, warmup_cosine


def compute_rates(schedule, steps, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, num_steps=steps, **options)
    optimizer.step()  # of nothing; a scheduler warns where its optimizer has made no step
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return values


def test_warmup_rises_to_the_rate_and_the_cosine_ends_at_its_final_fraction():
    values = compute_rates(warmup_cosine, 100, steps_per_epoch=10, warmup=0.1, final=0.01)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(values) == pytest.approx(2.0)
    assert values[55] == pytest.approx(0.01 * 2 + 0.99 * 1.0, rel=1e-6)  # half-way through the cosine
    assert values[-1] == pytest.approx(0.02, rel=0.05)


def test_the_horizon_is_the_runs_own():
    short, long = (compute_rates(warmup_cosine, n, steps_per_epoch=10, warmup=0.05, final=0.0) for n in (50, 500))
    assert short[-1] < 0.05
    assert long[49] > 1.9


def test_flat_cosine_stays_at_the_rate_and_then_falls_to_its_final_fraction():
    values = compute_rates(flat_cosine, 100, steps_per_epoch=10, warmup=0.1, flat=0.5, final=0.05)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert values[9:51] == pytest.approx([2.0] * 42)
    assert values[75] == pytest.approx(2.0 * (0.05 + 0.95 * 0.5), rel=1e-6)  # half-way through the cosine
    assert values[-1] == pytest.approx(0.1, rel=0.05)


def test_flat_cosine_that_is_never_flat_is_warmup_cosine():
    flat = compute_rates(flat_cosine, 40, steps_per_epoch=10, warmup=0.2, flat=0.0, final=0.01)
    assert flat == pytest.approx(compute_rates(warmup_cosine, 40, steps_per_epoch=10, warmup=0.2, final=0.01))


def compute_experiment_rates(num_epochs, *, steps_per_epoch):
    """The learning rate of each step of exp_submission, as a fraction of the first."""
    config = compose("train", ["experiment=exp_submission", f"trainer.max_epochs={num_epochs}", "data.root=x"])
    schedule = instantiate_key(config, "lr_schedule")
    values = compute_rates(schedule, num_epochs * steps_per_epoch, steps_per_epoch=steps_per_epoch)
    return [value / values[0] for value in values]


@pytest.mark.parametrize("steps_per_epoch", [1, 17, 2849])
def test_the_original_run_drops_its_rate_at_epochs_100_and_140_of_145(steps_per_epoch):
    values = compute_experiment_rates(145, steps_per_epoch=steps_per_epoch)
    drops = [step for step, (before, after) in enumerate(pairwise(values), start=1) if after < before]
    assert drops == [100 * steps_per_epoch, 140 * steps_per_epoch]
    assert values[-1] == pytest.approx(0.01)


@pytest.mark.parametrize("num_epochs", [3, 27])
def test_a_short_trial_reaches_every_milestone(num_epochs):
    values = compute_experiment_rates(num_epochs, steps_per_epoch=100)
    drops = [step for step, (before, after) in enumerate(pairwise(values), start=1) if after < before]
    assert drops == [round(num_epochs * 100 * epoch / 145) for epoch in (100, 140)]


@pytest.mark.parametrize("milestones", [[100, 140], [1]])
def test_milestones_in_epochs_are_refused(milestones):
    with pytest.raises(
        UserError, match=rf"milestones={re.escape(str(milestones))} must be fractions of the run.*max_epochs"
    ):
        compute_rates(multistep, 145, steps_per_epoch=1, milestones=milestones, gamma=0.1)


def test_constant_stays():
    assert compute_rates(constant, 5, steps_per_epoch=1) == [2.0] * 5
