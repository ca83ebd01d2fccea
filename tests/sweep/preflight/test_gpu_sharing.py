"""How many trials are put on one GPU, by throughput laws with a known answer, and the cap on what each may take."""

import json
import subprocess
import sys

import pytest

from handpose.config_files import REPOSITORY
from handpose.sweep.preflight.gpu_sharing import choose_trials_per_gpu, count_trials_per_gpu
from handpose.sweep.trainable.cost_callback import CONTEXT_BYTES
from handpose.sweep.trainable.gpu_memory import compute_gpus_per_trial, compute_memory_fraction


def make_saturating_law(limit):
    """Trials do not disturb each other until the GPU is full."""
    return lambda number: 10.0 * min(number, limit)


@pytest.mark.parametrize(
    ("limit", "memory_share", "most", "chosen"),
    [
        (1, 0.1, 16, 1),  # one trial fills it
        (4, 0.1, 16, 4),
        (3, 0.1, 16, 4),  # 2 leave a third of it idle; 3 is not tried
        (100, 0.3, 16, 3),  # memory
        (100, 0.48, 16, 1),  # two would fill it to the brim
        (100, 0.9, 16, 1),
        (100, 0.01, 6, 6),  # cores
    ],
)
def test_the_fewest_trials_that_train_most_are_put_on_a_gpu(limit, memory_share, most, chosen):
    choice = choose_trials_per_gpu(memory_share, max_trials=most, measure_steps_per_s=make_saturating_law(limit))
    assert choice.num_trials == chosen
    assert max(each.num_trials for each in choice.throughputs) * memory_share <= max(1.0, memory_share)


def test_more_trials_are_not_tried_once_they_no_longer_pay():
    tried = []

    def crowded(number):
        tried.append(number)
        return 10.0 if number == 1 else 8.0

    assert choose_trials_per_gpu(0.01, max_trials=32, measure_steps_per_s=crowded).num_trials == 1
    assert tried == [1, 2]


def test_a_number_that_does_not_fit_after_all_is_not_chosen():
    assert (
        choose_trials_per_gpu(
            0.2, max_trials=32, measure_steps_per_s=lambda number: 0.0 if number > 2 else 10.0 * number
        ).num_trials
        == 2
    )


def test_a_trial_that_takes_nothing_of_a_gpu_is_limited_by_cores():
    assert choose_trials_per_gpu(0.0, max_trials=3, measure_steps_per_s=make_saturating_law(100)).num_trials == 3


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8])
def test_as_many_shares_as_asked_for_fit_on_a_gpu_and_no_more(number):
    share = compute_gpus_per_trial(number)
    assert int(1 / share) == number
    assert round(share * 10_000) * number <= 10_000  # Ray's unit


@pytest.mark.parametrize("number", [2, 4, 8])
def test_capped_neighbours_leave_room_for_what_is_no_tensor(number):
    whole = 80e9
    taken = number * (
        compute_memory_fraction(compute_gpus_per_trial(number), total_bytes=whole) * whole + CONTEXT_BYTES
    )
    assert 0.98 * whole < taken <= whole


@pytest.mark.parametrize("share", [0.0, 1.0, 2.0])
def test_a_trial_that_is_alone_on_its_gpus_has_no_cap(share):
    assert compute_memory_fraction(share, total_bytes=80e9) == 1.0


def test_a_small_gpu_leaves_half_of_a_share_at_least():
    assert compute_memory_fraction(0.125, total_bytes=4e9) == 0.0625


def test_each_gpu_has_its_part_of_the_cores():
    assert count_trials_per_gpu({"CPU": 64.0, "GPU": 8.0}, cpus_per_trial=2) == 4
    assert count_trials_per_gpu({"CPU": 4.0, "GPU": 8.0}, cpus_per_trial=1) == 1


@pytest.mark.slow
def test_neighbours_share_one_gpu_and_their_steps_add_up(tmp_path):
    command = [sys.executable, "-m", "tests.sweep.preflight.gpu_sharing_program", str(tmp_path / "told.json")]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "told.json").read_text()) == {"alone": 2.0, "three": 6.0, "killed": 0.0}
