"""Searchers that tests notify of one event after the other, as a sweep's controller does it with snapshots."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from handpose.search.searcher import Searcher, TrialSnapshot


@dataclass
class TrialFeed:
    """A searcher that is notified of single events. Everything else is the searcher's own."""

    searcher: Searcher
    snapshots: dict[int, TrialSnapshot] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.searcher, name)

    def suggest(self, number):
        params = self.searcher.suggest(number)
        self.snapshots.setdefault(number, TrialSnapshot(number, "running", params, {}))
        return params

    def restore_trials(self, trials):
        self.snapshots = {trial.number: trial for trial in trials}
        self.searcher.restore_trials(list(self.snapshots.values()))

    def on_segment_start(self, number):
        self._update(number, state="running")

    def on_trial_wait(self, number):
        self._update(number, state="paused")

    def on_trial_cost(self, number, costs):
        self._update(number, costs=costs)

    def on_trial_result(self, number, epoch, value):
        self._update(number, values={**self.snapshots[number].values, epoch: value})

    def on_trial_end(self, number, state):
        self._update(number, state=state)

    def _update(self, number, **changes):
        self.snapshots[number] = self.snapshots[number]._replace(**changes)
        self.searcher.on_trial_update(self.snapshots[number])


@contextmanager
def killed_after_trials(searcher, num_stored):
    """The process is killed within the block, when the searcher has stored so many trials."""
    num_left = [num_stored]

    def store_some(*arguments):
        if not num_left[0]:
            raise KeyboardInterrupt
        num_left[0] -= 1
        return store(*arguments)

    store = searcher._storage.create_new_trial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searcher._storage, "create_new_trial", store_some)
        with pytest.raises(KeyboardInterrupt):
            yield
