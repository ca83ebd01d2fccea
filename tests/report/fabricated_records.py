"""Sweeps that were never run, whose truth is known."""

import math
import random

from handpose.report.sweep_record import EpochReport, Parameter, SegmentRecord, SweepRecord, TrialRecord

METRIC = "val/pa_mpjpe_mm"

RATE = Parameter("optimizer.lr", "float", 1e-4, 1e-1, log=True, expression="tag(log, interval(1e-4, 0.1))")
DEPTH = Parameter("model.decoder.depth", "int", 1, 5, step=1, expression="range(1, 6)")
SCALE = Parameter("augment.scale", "float", 0.0, 0.4, expression="interval(0.0, 0.4)")
HEAD = Parameter("model.decoder.head", "choice", choices=["heatmaps", "axes"], expression="choice(heatmaps, axes)")


def make_trial(number, params, values, *, state="complete", began=0.0, epoch_s=1.0, **rest):
    """A trial in one stretch, an epoch every epoch_s seconds."""
    reports = [
        EpochReport(epoch, began + epoch * epoch_s, epoch * epoch_s, value)
        for epoch, value in enumerate(values, start=1)
    ]
    end = reports[-1].at_s if reports else began
    return TrialRecord(
        number,
        params,
        state,
        len(values),
        values[-1] if values else math.nan,
        end - began,
        reports=reports,
        segments=[SegmentRecord(began, end, 0, "over")],
        **rest,
    )


def make_record(trials, parameters=(), *, max_epochs=4, **rest):
    """A finished sweep of these trials, ranked as the table ranks them."""
    sound = [each for each in trials if each.state not in ("failed", "diverged", "infeasible")]
    sound = [each for each in sound if math.isfinite(each.value)]
    ranked = sorted(sound, key=lambda each: (-each.epochs, each.value, each.number))
    given = {
        "name": "made",
        "folder": "",
        "metric": METRIC,
        "mode": "min",
        "num_trials": len(trials),
        "max_epochs": max_epochs,
        "num_slots": 1,
        "seconds": max((each.segments[-1].ended_s for each in trials), default=0.0),
        "end": "finished",
        "trials": trials,
        "ranked": [each.number for each in ranked],
        "parameters": parameters,
    }
    return SweepRecord(**given | rest)


def make_swept_record(
    loss, parameters, *, num_trials=60, seed=0, curve=lambda loss: [loss + 3, loss + 1, loss + 0.1, loss]
):
    """A sweep of points thrown evenly over the parameters. loss: of params. curve: the values that lead to it."""
    draws = random.Random(seed)
    trials = []
    for number in range(num_trials):
        params = {each.key: draw_value(each, draws) for each in parameters}
        trials.append(make_trial(number, params, curve(loss(params))))
    return make_record(trials, parameters)


def draw_value(parameter, draws):
    """A value at random."""
    if parameter.kind == "choice":
        return draws.choice(list(parameter.choices))
    if parameter.kind == "int":
        return draws.randint(int(parameter.low), int(parameter.high))
    return parameter.to_value(draws.random())
