"""What a sweep will cost, in sentences: every figure is there, none is cut off."""

import math

from handpose.report.preflight import (
    PointRow,
    WorkEstimate,
    format_confirm_cost,
    format_disk_use,
    format_points_table,
    format_sweep_cost,
    format_trial_cost,
)


def make_row(**changes):
    values = {
        "label": "random",
        "params": {"optimizer.lr": 0.00123456, "model.decoder.depth": 3},
        "num_parameters": 1_614_725,
        "step_s": 0.0653,
        "trial_s": 3725.0,
        "memory_mb": 88.1,
        "process_mb": 1100.0,
        "latency_ms": 2.614,
        "checkpoint_mb": 19.68,
    }
    return PointRow(**values | changes)


def test_the_line_of_a_trial_spans_the_points():
    rows = [make_row(), make_row(trial_s=600.0, memory_mb=221.0, process_mb=1400.0, num_parameters=2_500_000)]
    assert format_trial_cost(rows, typical_s=1800.0, gpu="") == (
        "a trial     about 30 min (10 min to 62 min), 1.6 to 2.5 million parameters, "
        "88 to 221 MB of memory in a training step, 1.4 GB in a process"
    )


def test_what_is_not_known_is_not_told():
    assert "process" not in format_trial_cost([make_row(process_mb=math.nan)], typical_s=60.0, gpu="")
    assert "step on NVIDIA A100" in format_trial_cost([make_row()], typical_s=60.0, gpu="NVIDIA A100")


def test_early_stopping_is_told_where_it_saves_something():
    whole, half = WorkEstimate(slot_s=7200.0, wall_s=3600.0), WorkEstimate(slot_s=3600.0, wall_s=1800.0)
    told = {"num_trials": 12, "num_slots": 2, "time_budget_s": None}
    without = "the sweep   12 trials in 2 slots: 2 slot-hours, 60 min"
    assert format_sweep_cost(whole=whole, expected=whole, **told) == without
    assert format_sweep_cost(whole=whole, expected=half, **told) == (
        without + " without early stopping; about 1 slot-hours, 30 min with it"
    )


def test_a_budget_is_told_where_it_ends_the_sweep():
    work = WorkEstimate(slot_s=7200.0, wall_s=3600.0)
    line = format_sweep_cost(num_trials=1, num_slots=1, whole=work, expected=work, time_budget_s=1200.0)
    assert line.endswith("; sweep.time_budget_s ends it after 20 min")


def test_the_confirmation_is_told_as_work_that_comes_after_the_sweep():
    line = format_confirm_cost(num_runs=8, work=WorkEstimate(slot_s=7200.0, wall_s=3600.0))
    assert line == "to confirm  8 runs at most, afterwards: 2 slot-hours, 60 min"


def test_the_line_of_the_disk_has_its_folder():
    line = format_disk_use(checkpoint_mb=19.7, needed_gb=0.0788, budget_gb=20.0, free_gb=69.4, folder="/scratch")
    assert line == (
        "the disk    20 MB per checkpoint, at least 0.079 GB and at most 20 GB of checkpoints; 69 GB free in /scratch"
    )


def test_the_table_has_every_parameter_of_every_point():
    many = {f"loss.weight_{number}": number / 7 for number in range(40)}
    head, first, second = format_points_table(
        [make_row(params=many), make_row(params={"model/decoder": "pyramid"})]
    ).splitlines()
    assert [f"weight_{number}" in head for number in range(40)] == [True] * 40
    assert "decoder" in head
    assert first.split()[:4] == ["random", "0", "0.143", "0.286"]
    assert "pyramid" in second
    assert first.split()[-6:] == ["1,614,725", "65.3", "1:02:05", "88", "2.61", "19.7"]
