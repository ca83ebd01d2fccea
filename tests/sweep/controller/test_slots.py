"""How many trials run at a time."""

import pytest

from handpose.errors import UserError
from handpose.resources import Memory
from handpose.sweep.controller.slots import (
    NodeCapacity,
    Slots,
    compute_trial_memory,
    count_slots,
    format_memory,
    recount_slots,
)
from tests.sweep.sweeps import make_settings


@pytest.mark.parametrize(
    ("has", "asked", "slots"),
    [
        ({"CPU": 8}, {"cpus_per_trial": 2}, Slots(4, 2, 0.0)),
        ({"CPU": 8}, {"cpus_per_trial": 2, "max_concurrent": 3}, Slots(3, 2, 0.0)),
        ({"CPU": 64, "GPU": 2}, {}, Slots(2, 1, 1.0)),
        ({"CPU": 64, "GPU": 2}, {"gpus_per_trial": 0.25}, Slots(8, 1, 0.25)),
        ({"CPU": 64, "GPU": 2}, {"gpus_per_trial": 0.3}, Slots(6, 1, 0.3)),
        ({"CPU": 64, "GPU": 8}, {"gpus_per_trial": 4}, Slots(2, 1, 4)),
        ({"CPU": 4, "GPU": 8}, {"gpus_per_trial": 0}, Slots(4, 1, 0)),
        ({"CPU": 64, "GPU": 2}, {"gpus_per_trial": "auto"}, Slots(2, 1, 1.0)),
        ({"CPU": 64}, {"gpus_per_trial": "auto"}, Slots(64, 1, 0.0)),
    ],
)
def test_there_are_as_many_slots_as_cores_and_gpus_hold(has, asked, slots, tmp_path):
    assert count_slots(make_settings(tmp_path, **asked), [has]) == slots


def test_a_trial_that_fits_nowhere_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no trial fits: sweep.cpus_per_trial=8 .* Ray has 4 cores and 0 GPUs"):
        count_slots(make_settings(tmp_path, cpus_per_trial=8), [{"CPU": 4}])


def test_a_share_that_was_found_out_counts_before_the_settings(tmp_path):
    settings = make_settings(tmp_path, gpus_per_trial="auto")
    assert count_slots(settings, [{"CPU": 64, "GPU": 2}], gpus=0.3333) == Slots(6, 1, 0.3333)


def test_no_trial_lies_across_two_nodes(tmp_path):
    nodes = [{"CPU": 3}, {"CPU": 5}, {"CPU": 1}]
    assert count_slots(make_settings(tmp_path, cpus_per_trial=2), nodes) == Slots(3, 2, 0.0)
    with pytest.raises(UserError, match="Ray has 9 cores and 0 GPUs on 3 nodes"):
        count_slots(make_settings(tmp_path, cpus_per_trial=6), nodes)


def test_workers_of_a_trial_may_lie_on_several_nodes(tmp_path):
    settings = make_settings(tmp_path, workers_per_trial=3, cpus_per_trial=2)
    slots = count_slots(settings, [{"CPU": 64, "GPU": 4}, {"CPU": 64, "GPU": 3}])
    assert slots == Slots(2, 2, 1.0, num_workers=3)
    assert slots.total_gpus == 3.0
    with pytest.raises(
        UserError, match=r"gpus_per_trial=1 for each of sweep.workers_per_trial=3, but Ray has .* 2 GPUs"
    ):
        count_slots(settings, [{"CPU": 64, "GPU": 2}])


def test_a_trial_is_kept_off_nodes_only_where_it_fits_without_them():
    nodes = [("head", {"CPU": 0}), ("one", {"CPU": 2}), ("two", {"CPU": 3}), ("two", {"CPU": 1})]  # of one host
    capacity = NodeCapacity.from_nodes(nodes, Slots(3, 1, 0.0, num_workers=3))
    assert capacity.workers_by_node == {"one": 2, "two": 4}
    assert capacity.find_nodes_without({"one"}) == {"two"}
    assert capacity.find_nodes_without({"two"}) == set()
    assert capacity.find_nodes_without({"another"}) == {"one", "two"}


def test_slots_are_counted_anew_when_nodes_come_and_go(tmp_path):
    settings = make_settings(tmp_path, max_concurrent=3)
    slots = count_slots(settings, [{"CPU": 2}])
    counts = [recount_slots(settings, slots, [{"CPU": 2}] * number).num_slots for number in (0, 1, 2)]
    assert counts == [0, 2, 3]


def test_a_budget_in_gpu_hours_is_refused_where_trials_hold_no_gpu(tmp_path):
    with pytest.raises(UserError, match=r"sweep.gpu_hours=2 would never be spent.*sweep.time_budget_s"):
        count_slots(make_settings(tmp_path, gpu_hours=2.0), [{"CPU": 4}])
    assert count_slots(make_settings(tmp_path, gpu_hours=2.0), [{"CPU": 4, "GPU": 1}]).gpus == 1.0


@pytest.mark.parametrize(
    ("nodes", "num_slots"),
    [
        ([{"CPU": 64, "memory": 22e9}], 20),
        ([{"CPU": 64, "memory": 22e9}, {"CPU": 4, "memory": 500e9}], 24),  # memory of one node is no use to another
        ([{"CPU": 64, "GPU": 2, "memory": 5e9}], 4),
        ([{"CPU": 3, "memory": 22e9}], 3),
        ([{"CPU": 3}], 3),
    ],
)
def test_each_node_holds_as_many_trials_as_its_memory(tmp_path, nodes, num_slots):
    settings = make_settings(tmp_path, gpus_per_trial=0.1 if "GPU" in nodes[0] else 0)
    assert count_slots(settings, nodes, process_mb=1100.0).num_slots == num_slots


def test_every_worker_of_a_trial_needs_its_memory(tmp_path):
    settings = make_settings(tmp_path, workers_per_trial=2)
    assert count_slots(settings, [{"CPU": 64, "memory": 5e9}], process_mb=1000.0).num_slots == 2


def test_memory_counts_also_before_it_has_been_measured(tmp_path):
    machine = {"CPU": 64, "memory": 4e9}
    slots = count_slots(make_settings(tmp_path), [machine])
    assert slots.num_slots == 8
    line = format_memory(make_settings(tmp_path), slots, [machine])
    assert line.startswith(
        "the memory  the process of a trial may take 0.5 GB, and 4.0 GB of memory are free for trials: 8"
    )
    assert format_memory(make_settings(tmp_path, max_concurrent=8), slots, [machine]) == ""


def test_a_trial_that_no_nodes_memory_holds_is_refused_with_both_figures(tmp_path):
    nodes = [{"CPU": 8, "memory": 1e9}, {"CPU": 8, "memory": 2e9}, {"CPU": 0, "memory": 64e9}]
    with pytest.raises(
        UserError, match=r"may take 3.0 GB, but only 1.0 to 2.0 GB of memory are free for trials on each node.*--memory"
    ):
        count_slots(make_settings(tmp_path), nodes, process_mb=3000.0)


def test_memory_for_trials_leaves_enough_for_ray_and_stays_below_its_threshold():
    memory = Memory(total=int(20e9), available=int(16e9), is_limited=False)
    kept = memory.available - compute_trial_memory(memory)
    used = memory.total - memory.available + compute_trial_memory(memory)
    assert kept > 300e6  # of Ray's own processes
    assert used < 0.95 * memory.total
    assert compute_trial_memory(memory, with_driver=True) < compute_trial_memory(memory) - 600e6
    assert compute_trial_memory(memory._replace(available=0)) == 1
