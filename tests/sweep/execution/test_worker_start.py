"""A worker that cannot be started is told from a slot that is taken, and does not keep a sweep waiting."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial

from handpose.config_files import REPOSITORY
from handpose.errors import UserError
from handpose.sweep.execution.worker_start import PATIENCE_S, StartWatch

PENDING, RUNNING = (SimpleNamespace(status=status) for status in (Trial.PENDING, Trial.RUNNING))


class WatchedStart:
    """A StartWatch that is looked at once a second; starts: whether Ray can start workers. said: its lines."""

    def __init__(self, *, starts):
        self.now, self.said, self.num_probes, self.starts = 0.0, [], 0, starts
        self._watch = StartWatch(self.said.append, probe=self._probe, clock=lambda: self.now)

    def _probe(self):
        self.num_probes += 1
        return SimpleNamespace(has_run=lambda: self.starts)

    def after(self, seconds, *trials, has_slots=True):
        for _ in range(int(seconds)):
            self.now += 1.0
            self._watch.check(trials, has_slots=has_slots)


def test_a_sweep_ends_with_a_sentence_where_no_worker_can_be_started():
    watched = WatchedStart(starts=False)
    watched.after(PATIENCE_S, PENDING)
    with pytest.raises(UserError, match=r"Ray has not started a worker process within 5 minutes"):
        watched.after(2, PENDING)


def test_a_sweep_waits_for_slots_that_others_hold_and_says_so_once():
    watched = WatchedStart(starts=True)
    watched.after(10 * PATIENCE_S, PENDING, PENDING)
    assert watched.said == ["all slots are used by others; the sweep waits until one is free"]
    assert watched.num_probes == 1


@pytest.mark.parametrize(
    ("trials", "has_slots"), [([PENDING, RUNNING], True), ([], True), ([PENDING], False)], ids=["runs", "idle", "nodes"]
)
def test_only_a_wait_of_all_trials_in_a_cluster_with_slots_is_timed(trials, has_slots):
    watched = WatchedStart(starts=False)
    watched.after(PATIENCE_S - 1, PENDING)
    watched.after(3 * PATIENCE_S, *trials, has_slots=has_slots)
    watched.after(PATIENCE_S, PENDING)  # counts from anew
    assert watched.said == []


_SWEEP = """
import sys
from pathlib import Path
from handpose.sweep.execution import runtime
from handpose.sweep.execution import worker_start
from handpose.search.space import load_space
from tests.sweep.conftest import make_settings, run_small_sweep
from tests.sweep.objectives import curve

worker_start.PROBE_AFTER_S, worker_start.PATIENCE_S = 1.0, 4.0
runtime.find_worker_interpreter = lambda executable: {"py_executable": "/nowhere/my python"}
folder = Path(sys.argv[1])
(folder / "space.yaml").write_text("x: interval(0, 1)")
run_small_sweep(make_settings(folder / "sweep"), load_space(str(folder / "space.yaml")), curve)
"""


@pytest.mark.slow
def test_without_a_preflight_a_sweep_whose_workers_never_start_ends_and_names_the_reason(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _SWEEP, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, timeout=100
    )
    assert "UserError: Ray has not started a worker process" in done.stderr
    assert "/nowhere/my: No such file or directory" in done.stderr
    assert "sweep.resume=" in done.stderr
