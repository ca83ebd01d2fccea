"""A sweep without Ray, Optuna or networks: what is left is the order of events, and what is decided from it."""

import hashlib
import math
import random
from dataclasses import replace
from pathlib import Path

from handpose.errors import UserError
from handpose.report.trial_table import TrialTable, make_second_objectives
from handpose.search.searcher import Searcher
from handpose.search.space import parse_space
from handpose.sweep.controller.controller import SweepController
from handpose.sweep.controller.history import History
from handpose.sweep.record.events import CostsMeasured, EpochReported, EventLog, TrialEnded, TrialSuggested, read_events
from handpose.sweep.storage.checkpoint_files import open_worker_files
from handpose.sweep.storage.folder_sync import open_checkpoint_files
from tests.sweep.objectives import METRIC


class FakeSearcher(Searcher):
    """A searcher whose proposals depend on the number alone, and that writes down what it is told of each trial."""

    def __init__(self):
        self.told = {}
        self.space = ""
        self.started = 0

    def suggest(self, number):
        generator = random.Random(f"{number} {self.space}" if self.space else number)
        return {"optimizer.lr": 10 ** generator.uniform(-4, -1), "model.decoder.depth": generator.randrange(1, 6)}

    def check_point(self, params):
        if set(params) != {"optimizer.lr"}:
            raise UserError("only the learning rate can be given")

    def suggest_point(self, number, params):
        return {**self.suggest(number), **params}

    def check_space(self, space, trials):
        if space.name == "odd":
            raise UserError("this space is odd")
        return None if space.name != "few" else len(trials) + 2

    def on_space(self, space, trials):
        assert [trial.number for trial in trials] == list(range(len(trials)))
        self.space, self.started = space.name, len(trials)

    def on_trial_update(self, trial):
        self.told[trial.number] = "waits" if trial.state in ("waiting", "paused") else trial.state


def load_space_record(record):
    return parse_space(record.text, Path(record.name))


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class SimulatedSweep:
    """A sweep whose process can be killed at any moment.

    is_late: a checkpoint is written after its epoch's report and told with the next one's, but for those at rungs.

    mirror: makes the one of a process, for a sweep that is kept in a store; scratch: of its workers.

    loss: of (trial, params, epoch). rule: makes a fresh one. Which of the running trials reports next depends only on
    how many reports there were, so that two sweeps that are killed at different moments hear the same.
    """

    def __init__(
        self, settings, scheduler, loss, *, num_slots=3, every=1, seed=0, is_late=False, folder_sync=None, scratch=None
    ):
        self.settings, self.make_scheduler, self.loss, self.num_slots, self.every = (
            settings,
            scheduler,
            loss,
            num_slots,
            every,
        )
        self.seed = seed
        self.is_late = is_late
        self.make_mirror, self.scratch = folder_sync or (lambda: None), scratch
        self.rungs = scheduler().rungs if scheduler().needs_checkpoints else ()
        self.clock = FakeClock()
        self.opened = 0
        self.start()

    @property
    def file(self):
        return self.settings.path / "events.jsonl"

    def start(self):
        """A new process."""
        table = TrialTable(METRIC, self.settings.mode, self.settings.num_trials, self.settings.max_epochs)
        self.mirror = self.make_mirror()
        self.log = EventLog(self.file)
        self.proposer = FakeSearcher()
        table.objectives = make_second_objectives(self.settings.second_objective)
        files = open_checkpoint_files(self.mirror, self.settings.path)
        history = History(
            self.settings, scheduler=self.make_scheduler(), table=table, files=files, load_space=load_space_record
        )
        self.controller = SweepController(
            self.settings, log=self.log, history=history, searcher=self.proposer, clock=self.clock
        )
        self.controller.open(num_slots=self.num_slots)
        self.segments, self.epochs, self.untold = {}, {}, {}
        self.opened += 1

    def kill(self):
        """The process is gone, with all that it had in memory."""
        self.log.close()

    def fill(self):
        """Give every slot something to do."""
        while (segment := self.controller.next_segment()) is not None:
            with open_worker_files(segment, scratch=self.scratch) as files:
                whole = files.fetch_newest(segment.checkpoints)
                assert whole is None or whole[1].read_text().endswith(f" epoch {whole[0].epoch}")
            assert segment.epoch == (whole[0].epoch if whole else 0)
            if not self._measure(segment):
                continue
            self.segments[segment.trial], self.epochs[segment.trial] = segment, segment.epoch

    def _measure(self, segment):
        """What the trial costs, where it is asked for; measured again it comes out otherwise."""
        if self.settings.second_objective is None or segment.epoch:
            return True
        noise = 1.0 if self.controller.history.table.rows[segment.trial].costs else 0.0
        costs = {"latency_ms": compute_latency_ms(segment.params) + noise, "num_parameters": 1e6, "memory_mb": 50.0}
        return self.controller.process_costs(segment.trial, costs)

    def step(self):
        """One report; those of before, which a trial repeats after a kill, change nothing and do not count."""
        self.clock.now += 1.0
        number = self._choose_next_report()
        segment = self.segments[number]
        row = self.controller.history.table.rows[number]
        last = segment.max_epochs or self.settings.max_epochs
        rungs = self.rungs if segment.max_epochs is None else segment.rungs
        while True:
            self.epochs[number] = epoch = self.epochs[number] + 1
            is_new = epoch > row.epochs
            is_due, is_late = epoch % self.every == 0, self.is_late and epoch not in rungs and epoch < last
            checkpoint = self.untold.pop(number, None)
            if is_due and not is_late:
                if checkpoint is not None:  # it is not reported, as a newer one is
                    with open_worker_files(segment, scratch=self.scratch) as files:
                        files.discard(checkpoint)
                checkpoint = self._save_checkpoint(segment, epoch)
            metrics = {METRIC: self.loss(number, segment.params, epoch)}
            goes_on = self.controller.process_report(
                number, epoch, metrics, resumed_from=segment.epoch, checkpoint=checkpoint
            )
            if is_due and is_late and goes_on:
                self.untold[number] = self._save_checkpoint(segment, epoch)
            if goes_on and epoch == last:
                self.controller.process_return(number)
                goes_on = False
            if is_new or not goes_on:
                break
        if not goes_on:
            del self.segments[number]

    def _choose_next_report(self):
        running = sorted(self.segments)
        text = f"{self.seed} {self.controller.history.num_reports}"
        return running[int(hashlib.sha256(text.encode()).hexdigest(), 16) % len(running)]

    def _save_checkpoint(self, segment, epoch):
        with open_worker_files(segment, scratch=self.scratch) as files:
            file = files.get_local_path(segment.make_checkpoint_name(epoch))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"trial {segment.trial} epoch {epoch}")
            return files.commit(file, epoch=epoch, is_needed=False)

    def run(self, *, kill_when=lambda num_reports: False):
        """To the end; kill_when: whether the process is killed after so many reports."""
        killed_after = set()
        while True:
            self.fill()
            if self.controller.is_over:
                break
            self.step()
            num_reports = self.controller.history.num_reports
            if num_reports not in killed_after and kill_when(num_reports):
                killed_after.add(num_reports)
                self.kill()
                self.start()
        self.controller.close("finished")
        self.log.close()
        return self

    def list_decisions(self):
        """The log of what was decided, without times and without how often the process began."""
        kept = [
            event
            for event in read_events(self.file)
            if isinstance(event, (TrialSuggested, CostsMeasured, EpochReported, TrialEnded))
        ]
        return [replace(event, at=0.0, **_drop_segment_details(event)) for event in kept]


def compute_latency_ms(params):
    """Deep networks are slow, and the faster they learn the slower: the two objectives are at odds."""
    return params["model.decoder.depth"] + abs(4 - abs(math.log10(params["optimizer.lr"]) + 3))


def _drop_segment_details(event):
    """Which stretch wrote a checkpoint, and where it had begun, is no decision."""
    return {"checkpoint": None, "resumed_from": 0} if isinstance(event, EpochReported) else {}
