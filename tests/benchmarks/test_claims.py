"""The benchmark of what a report claims: fabricated sweeps are sweeps, and their truth is counted as it is."""

import pytest

from benchmarks.claims import (
    SweepKind,
    compute_effects_loss,
    compute_noise_loss,
    format_table,
    judge_sweep,
    list_claims,
    summarise_cell,
)
from benchmarks.fabricated import SPACE_NAMES, SweepSetup, fabricate_sweep
from handpose.sweep.analysis.read_sweep import read_sweep
from tests.report.fabricated_records import RATE, SCALE, make_swept_record


@pytest.mark.parametrize("scheduler", [("fifo", "stop"), ("asha", "stop"), ("asha", "promote")])
def test_a_fabricated_sweep_is_read_like_any_other(tmp_path, scheduler):
    setup = SweepSetup("default", "random", *scheduler, num_trials=9, max_epochs=3)
    fabricate_sweep(setup, compute_noise_loss, tmp_path / "sweep", seed=1)
    made = read_sweep(tmp_path / "sweep")
    assert made.end == "finished"
    assert len(made.trials) == 9
    assert max(trial.epochs for trial in made.trials) == 3
    assert {parameter.key for parameter in made.parameters} == {"model.decoder.depth", "heatmap.sigma", "optimizer.lr"}
    if scheduler[0] == "fifo":
        assert {trial.state for trial in made.trials} == {"complete"}
    else:
        assert "stopped" in {trial.state for trial in made.trials}


def test_the_same_seed_fabricates_the_same_sweep_and_one_that_is_kept_is_judged_again(tmp_path):
    cell = SweepKind("effects", "default", "tpe", "asha stop")
    first = judge_sweep(cell, 3, 15, tmp_path)
    (events,) = tmp_path.glob("*/3/events.jsonl")
    before = events.read_bytes()
    assert judge_sweep(cell, 3, 15, tmp_path) == first
    assert events.read_bytes() == before
    assert judge_sweep(cell, 3, 15, tmp_path / "again") == first


@pytest.mark.parametrize("space", SPACE_NAMES)
def test_the_third_effect_is_of_a_parameter_that_the_space_has(space, tmp_path):
    setup = SweepSetup(space, "random", "fifo", num_trials=4, max_epochs=1)
    fabricate_sweep(setup, lambda *given: compute_effects_loss(space, *given), tmp_path / "sweep", seed=0)
    assert len(read_sweep(tmp_path / "sweep").ranked) == 4


def test_a_true_effect_is_no_false_one_and_the_reverse():
    made = make_swept_record(lambda params: 30 - 5 * RATE.to_place(params["optimizer.lr"]), [RATE, SCALE])
    true = list_claims(made, SweepKind("effects", "default", "random", "fifo"))
    assert (true["shown"], true["not_so"]) == (["optimizer.lr"], [])
    assert true["edges"] == [["optimizer.lr", True]]
    assert true["cut_off"] == []
    false = list_claims(made, SweepKind("noise", "default", "random", "fifo"))
    assert (false["any"], false["shown"], false["not_so"]) == (True, [], ["optimizer.lr"])
    other = make_swept_record(lambda params: 30 + 5 * RATE.to_place(params["optimizer.lr"]), [RATE, SCALE])
    wrong = list_claims(other, SweepKind("effects", "default", "random", "fifo"))
    assert wrong["cut_off"] == ["optimizer.lr"]  # the upper end, which is the best one in these sweeps' truth


def test_the_table_has_a_line_for_each_cell_and_the_largest_rate():
    cells = [SweepKind("noise", space, "random", "fifo") for space in ("default", "recipe")]
    quiet = list_claims(make_swept_record(lambda params: 99 + params["augment.scale"], [SCALE], num_trials=5), cells[0])
    loud = {**quiet, "any": True}
    text = format_table([summarise_cell(cells[0], [quiet] * 9 + [loud]), summarise_cell(cells[1], [quiet] * 10)])
    assert "default, random, fifo                                   10         0.10" in text
    assert text.splitlines()[-1].split()[:2] == ["largest", "0.100"]
