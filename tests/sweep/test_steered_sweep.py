"""A sweep with all its files, steered and killed at random: the audit finds that nothing was lost or done twice."""

import random

import pytest

from handpose.sweep.audit.audit import audit
from handpose.sweep.record.events import SpaceRecord
from tests.sweep.whole_sweep import WholeSweep

KINDS = {
    "stop": ("scheduler.reduction_factor=2", "searcher=random"),
    "promote": ("scheduler.reduction_factor=2", "scheduler.mode=promote"),
    "population": ("scheduler=pbt", "scheduler.perturbation_interval=1"),
    "points": (
        "scheduler=median",
        "scheduler.grace_period=1",
        "scheduler.min_samples_required=1",
        "searcher.points_to_evaluate=[{optimizer.lr: 0.002},{optimizer.lr: 0.003}]",
    ),
}


SPACES = [
    SpaceRecord("narrow.yaml", "optimizer.lr: tag(log, interval(1e-3, 5e-3))\nheatmap.sigma: interval(0.03, 0.08)\n"),
    SpaceRecord("choice.yaml", "optimizer.lr: choice(0.002, 0.004, 0.006)\n"),
    SpaceRecord("other.yaml", "optimizer.lr: tag(log, interval(1e-4, 1e-2))\nmodel.decoder.depth: range(2, 5)\n"),
    SpaceRecord(
        "code.py",
        "def space(trial):\n"
        "    params = {'optimizer.lr': trial.suggest_float('optimizer.lr', 1e-3, 1e-2)}\n"
        "    if params['optimizer.lr'] < 5e-3:\n"
        "        params['heatmap.sigma'] = trial.suggest_float('sigma', 0.03, 0.05)\n"
        "    return params\n",
    ),
]


def draw_command(rng):
    """A command and its values, which may be refused."""
    action = rng.choice(
        [
            "stop",
            "retry",
            "keep",
            "keep",
            "add",
            "trials",
            "epochs",
            "epochs",
            "space",
            "space",
            "slots",
            "pause",
            "budget",
        ]
    )
    if action in ("stop", "retry", "keep"):
        return action, {"trial": rng.randrange(6)}
    if action == "add":
        return action, {"params": {"optimizer.lr": rng.choice([0.002, 0.004, 0.006])}}
    if action == "space":
        return action, {"space": rng.choice(SPACES)}
    limits = {
        "trials": {"num_trials": rng.randint(4, 9)},
        "epochs": {"max_epochs": rng.choice([6, 9])},
        "slots": {"max_concurrent": rng.randint(1, 3)},
    }
    return action, {"limits": limits.get(action, {"time_budget_s": 5000.0} if action == "budget" else {})}


def list_commands(rng):
    """Commands in the order of the reports after which they are given. A pause ends after one more report."""
    commands = []
    for num_reports in sorted(rng.sample(range(1, 16), 6)):
        action, values = draw_command(rng)
        commands.append((num_reports, action, values))
        if action == "pause":
            commands.append((num_reports + 1, "resume", {}))
    return commands


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_a_sweep_that_is_steered_and_killed_is_whole(tmp_path, kind, seed):
    check_sweep(tmp_path / "sweep", kind, random.Random(f"{kind} {seed}"))


def check_sweep(folder, kind, rng):
    fails = {(rng.randrange(6), rng.randint(1, 3)): "error" for _ in range(2)}
    sweep = WholeSweep(
        folder,
        *KINDS[kind],
        "sweep.max_retries=0",
        "sweep.stop_after_failures=9",
        fails=fails,
        commands=list_commands(rng),
    )
    sweep.run(stops=[(rng.randint(1, 3), rng.choice([None, "interrupted"])) for _ in range(2)])
    assert [text for kind in audit(folder) for text in kind] == []
