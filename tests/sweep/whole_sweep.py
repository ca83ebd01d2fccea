"""A sweep with all the files that tune.py leaves, in about a second: everything is real but Ray and the networks."""

import contextlib
import gzip
import json
import math
import zipfile
from dataclasses import replace

from hydra.utils import instantiate

from handpose.config import compose, location_overrides, quote_override, save
from handpose.report.terminal import Clock, PlainView
from handpose.schedulers.scheduler import Fifo
from handpose.search.space import holding, load_space
from handpose.sweep.analysis.report import REPORT, write_report
from handpose.sweep.audit.audit import choices_of
from handpose.sweep.controller.controller import Failure, SweepState
from handpose.sweep.controller.history import History, empty_table
from handpose.sweep.controller.scheduler_factory import rule_maker
from handpose.sweep.driver.recorder import Recorder
from handpose.sweep.driver.resume import Task, description, held_values, keep_budgets, keep_space, recorded_task
from handpose.sweep.driver.run import trial_logs
from handpose.sweep.record.events import EVENTS, EventLog
from handpose.sweep.record.provenance import provenance
from handpose.sweep.selection.confirm import FILE, FOLDER, PointSearcher, account, candidates, fresh_seeds, runs
from handpose.sweep.selection.winner import select_winner, write_chosen
from handpose.sweep.storage.retention import saved
from handpose.sweep.trainable.trial import TrialRecipe, training_overrides, with_params, with_target
from handpose.yaml_files import read_yaml, write_yaml

METRIC = "val/pa_mpjpe_mm"
RATES = "optimizer.lr: tag(log, interval(1e-4, 1e-2))\nheatmap.sigma: interval(0.03, 0.08)\n"


class Silent(PlainView):
    """A view that shows nothing."""

    def __init__(self):
        self._clock = Clock(time_budget_s=None)

    def ended(self, table, row):
        """Say nothing."""

    def note(self, text):
        """Say nothing."""


def loss(params, epoch):
    """Falls with the epochs, towards a value that is least at lr 1e-3 and sigma 0.04."""
    best = abs(math.log10(params.get("optimizer.lr", 5e-3)) + 3) + 20 * abs(params.get("heatmap.sigma", 0.04) - 0.04)
    return 10 + 5 * best + 8 / epoch + 0.3 * math.sin(7 * params.get("seed", 0) + 1e4 * best)


class Process:
    """A process that runs a sweep, as run.py puts it together, but for Ray.

    fails: (trial, epoch) -> kind of failure, of a trial's first stretch. diverges: (trial, epoch). slots: at a time.
    gpus: of each trial.
    """

    def __init__(self, sweep, searcher, rule, recipe, *, fails=(), diverges=(), slots=2, measures=False, gpus=0.0):
        self.sweep, self.searcher, self.slots, self.measures = sweep, searcher, slots, measures
        self.fails, self.diverges = dict(fails), set(diverges)
        self.log = EventLog(sweep.path / EVENTS)
        self.table = empty_table(sweep)
        history = History(sweep, rule=rule(), table=self.table, command=recipe.command)
        self.now = 0.0
        self.state = SweepState(sweep, log=self.log, history=history, searcher=searcher, clock=lambda: self.now)
        logs = trial_logs(sweep, self.table)
        self.recorder = Recorder(
            self.table, folder=sweep.path, shelf=history.shelf, tick=self.state.tick, view=Silent(), logs=logs
        )
        self.recorder.catch_up(self.state.last_event)
        self.state.open(num_slots=slots, gpus=gpus, listener=self.recorder)
        self.running = {}

    def run(self, num_reports=math.inf):
        """Until nothing is left, a budget is spent, or so many epochs are reported."""
        while num_reports > 0 and not self._is_spent():
            while (stretch := self.state.next()) is not None:
                self.now += 0.002
                if stretch.epoch or not self.measures or self._measured(stretch):
                    self.running[stretch.trial] = (stretch, stretch.epoch)
            if not self.running and self.state.is_over:
                return
            self.now += 1.25
            if self.running:
                num_reports -= self._step(min(self.running, key=lambda number: (self.running[number][1], number)))
            self.recorder._next_write = 0.0
            self.recorder.refresh()

    def _is_spent(self):
        state = self.state
        return self.sweep.spent_budget(elapsed_s=state.elapsed_s(), gpu_hours=state.gpu_hours()) is not None

    def _measured(self, stretch):
        costs = {"num_parameters": 1e6 * (1 + stretch.trial % 4), "latency_ms": 2.5, "memory_mb": 100.0 + stretch.trial}
        return self.state.measured(stretch.trial, costs)

    def _step(self, number):
        stretch, epoch = self.running[number]
        epoch += 1
        if stretch.stretch == 1 and (kind := self.fails.get((number, epoch))):
            del self.running[number]
            self.state.failed(number, Failure(kind, "it broke", "Traceback:\nit broke", "vm"))
            return 0
        file = stretch.checkpoint_file(epoch)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"trial {number} epoch {epoch}")
        checkpoint = saved(file, folder=self.sweep.path, epoch=epoch)
        value = math.nan if (number, epoch) in self.diverges else loss(stretch.params, epoch)
        metrics = {METRIC: value, "val/pck_auc": 10 / (10 + value)}
        self.running[number] = (stretch, epoch)
        if not self.state.reported(
            number, epoch, metrics, node="vm", resumed_from=stretch.epoch, checkpoint=checkpoint
        ):
            del self.running[number]
        return 1

    def leave(self, reason=None):
        """Close the sweep for a reason; None: the process is killed."""
        if reason is not None:
            self.state.close(reason)
            self.searcher.close()
        self.log.close()


class WholeSweep:
    """A sweep in a folder.

    overrides: of tune.py. space: text of its search space, whose file has the suffix. options: of `Process`.
    """

    def __init__(self, folder, *overrides, space=RATES, suffix=".yaml", **options):
        self.folder, self.options = folder, options
        folder.mkdir(parents=True)
        source = folder.parent / f"{folder.name}_space{suffix}"
        source.write_text(space)
        self.overrides = [
            f"sweep.name={folder.name}",
            quote_override("search_space", str(source)),
            "sweep.max_epochs=4",
            "sweep.num_trials=6",
            "sweep.confirm.seeds=0",
            "sweep.retry_delay_s=0",
            *overrides,
        ]
        config = compose("tune", [*self.overrides, quote_override("sweep.folder", str(folder))])
        space = load_space(str(source))
        task = Task(config, self.overrides, location_overrides(config), choices_of(self.overrides), space)
        held = held_values(space, [each.partition("=")[0] for each in self.overrides], task.defaults)
        self.task = replace(task, space=holding(space, held), held=held)
        self.sweep = instantiate(config.sweep)
        self.origin = provenance(data="0123456789abcdef")
        keep_space(space, folder)
        write_yaml(folder / "sweep.yaml", description(self.task, self.origin))
        overrides = with_target(training_overrides(self.overrides), config, self.sweep.target)
        self.recipe = TrialRecipe(overrides, self.task.locations, 4, 1, 1)

    def resume(self, *given):
        """What `sweep.resume` does before the sweep is opened. given: further overrides."""
        self.task = recorded_task(self.folder, given)
        self.sweep = instantiate(self.task.config.sweep)
        keep_budgets(self.task)
        return self

    def process(self, *, is_new=False):
        """The next process that runs it."""
        sweep, config = self.sweep, self.task.config
        rule = rule_maker(instantiate(config.scheduler), sweep, self.task.space)
        searcher = instantiate(config.searcher)(
            space=self.task.space,
            folder=self.folder / "study",
            name=sweep.name,
            metric=sweep.target.name,
            mode=sweep.target.mode,
            second_objective=sweep.second_objective,
            max_epochs=sweep.max_epochs,
            seed=sweep.seed,
            defaults=self.task.defaults,
            fingerprint="0123456789abcdef",
            resume=not is_new,
            repeats=rule().perturbs,
        )
        return Process(sweep, searcher, rule, self.recipe, **self.options)

    def run(self, num_reports=math.inf, *, stops=(), last="finished", given=()):
        """Run it to its end, or until so many epochs are reported.

        stops: (number of reports, reason) of processes before the last one, which leaves for the reason `last`. None:
        killed. given: overrides of the later processes.
        """
        process = self.process(is_new=not (self.folder / EVENTS).exists())
        for most, reason in stops:
            process.run(most)
            process.leave(reason)
            process = self.resume(*given).process()
        process.run(num_reports)
        process.leave(last)
        self.table = process.table
        return self

    def finish(self, *, seeds=0, retrained=True):
        """What comes after the trials."""
        confirmed = self._confirm(seeds) if seeds else None
        winner = select_winner(self.table, folder=self.folder, confirmed=confirmed)
        write_chosen(
            self.table,
            winner,
            overrides=lambda row: with_params(self.recipe.overrides, row.params),
            sweep=self.sweep,
            origin=self.origin,
            confirmed=confirmed,
        )
        if retrained:
            self._retrain()
        with contextlib.redirect_stdout(None):
            write_report([self.folder], self.folder / REPORT)
        return self

    def _confirm(self, num_seeds):
        folder = self.folder / FOLDER
        chosen = candidates(self.table, defaults=self.task.defaults, top_k=2)
        seeds = fresh_seeds(num_seeds, self.table, self.task.defaults)
        points = runs(chosen, seeds)
        sweep = replace(
            self.sweep,
            name=f"{self.sweep.name}/{FOLDER}",
            folder=str(folder),
            resume=str(self.folder),
            num_trials=len(points),
            second_objective=None,
            time_budget_s=None,
            gpu_hours=None,
        )
        folder.mkdir()
        keep_space(self.task.space, folder)
        write_yaml(folder / "sweep.yaml", {"confirms": str(self.folder), **self.origin})
        process = Process(sweep, PointSearcher(points), Fifo, self.recipe)
        process.run()
        process.leave("finished")
        confirmed = account(chosen, seeds, process.table)
        write_yaml(folder / FILE, confirmed)
        return confirmed

    def _retrain(self):
        place = self.folder / "retrain"
        (place / "checkpoints").mkdir(parents=True)
        best = quote_override("best", str(self.folder / "best.yaml"))
        save(compose("train", [best]), place / "config.yaml")
        overrides = with_params(self.recipe.overrides, read_yaml(self.folder / "best.yaml")["params"])
        (place / "overrides.json").write_text(json.dumps(overrides))
        with zipfile.ZipFile(place / "checkpoints" / "best-epoch003.ckpt", "w") as archive:
            archive.writestr("data.pkl", "weights" * 1000)
        (place / "test_preds.json.gz").write_bytes(gzip.compress(b"predictions"))
        metrics = {"test/pa_mpjpe_mm": 9.512, "test/pck_auc": 0.8125, "baseline/pa_mpjpe_mm": 14.25}
        content = {"checkpoint": str(place / "checkpoints" / "best-epoch003.ckpt"), "metrics": metrics}
        (place / "metrics.json").write_text(json.dumps(content))
