"""A sweep with all the files that tune.py leaves, in about a second: everything is real but Ray and the networks."""

import contextlib
import gzip
import json
import math
import time
import zipfile
from dataclasses import replace
from functools import partial

from hydra.utils import instantiate

from handpose.config import compose, list_location_overrides, quote_override, save_config
from handpose.report.terminal import PlainView, SweepClock
from handpose.report.utilisation import Utilisation
from handpose.schedulers.scheduler import Fifo
from handpose.search.space import fix_params, load_space
from handpose.sweep.analysis.report import REPORT_FILE, write_report
from handpose.sweep.audit.audit import compose_choices
from handpose.sweep.controller.controller import SegmentFailure, SweepController
from handpose.sweep.controller.history import History, make_empty_table
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler, make_searcher
from handpose.sweep.controller.stopping_rule import make_stopping_rule
from handpose.sweep.driver.intervention_inbox import InterventionInbox
from handpose.sweep.driver.recorder import Recorder
from handpose.sweep.driver.resume import (
    SweepTask,
    copy_space,
    find_fixed_params,
    load_recorded_task,
    make_sweep_record,
    save_budgets,
)
from handpose.sweep.driver.run import open_trial_logs
from handpose.sweep.record.events import EVENTS_FILE, EventLog
from handpose.sweep.record.interventions import InterventionFiles, make_intervention
from handpose.sweep.record.provenance import collect_provenance
from handpose.sweep.selection.confirm import (
    CONFIRM_FILE,
    CONFIRM_FOLDER,
    PointSearcher,
    choose_candidates,
    choose_fresh_seeds,
    list_runs,
    summarise_confirmation,
)
from handpose.sweep.selection.retrain_seeds import summarise_metrics
from handpose.sweep.selection.winner import select_winner, write_winner
from handpose.sweep.storage.retention import describe_checkpoint
from handpose.sweep.trainable.trial import (
    TrialRecipe,
    add_checkpoint_metric,
    add_param_overrides,
    select_training_overrides,
)
from handpose.yaml_files import read_yaml, write_yaml

METRIC = "val/pa_mpjpe_mm"
RATES = "optimizer.lr: tag(log, interval(1e-4, 1e-2))\nheatmap.sigma: interval(0.03, 0.08)\n"


class SilentView(PlainView):
    """A view that shows nothing."""

    def __init__(self):
        self._clock = SweepClock(time_budget_s=None)

    def show_trial_end(self, table, row):
        """Say nothing."""

    def show_note(self, text):
        """Say nothing."""


def compute_loss(params, epoch):
    """Falls with the epochs, towards a value that is least at lr 1e-3 and sigma 0.04."""
    best = abs(math.log10(params.get("optimizer.lr", 5e-3)) + 3) + 20 * abs(params.get("heatmap.sigma", 0.04) - 0.04)
    return 10 + 5 * best + 8 / epoch + 0.3 * math.sin(7 * params.get("seed", 0) + 1e4 * best)


def report_loss(params, epoch, sweep):
    """What a trial reports: in later folds the mean over those that are completed, until the next one is."""
    fold = (epoch - 1) // sweep.max_epochs
    if not fold:
        return compute_loss(params, epoch)
    num_completed = epoch // sweep.max_epochs
    return compute_loss(params, sweep.max_epochs) + sum(0.2 * math.sin(each) for each in range(num_completed))


class SweepProcess:
    """A process that runs a sweep, as run.py puts it together, but for Ray.

    fails: (trial, epoch) -> kind of failure, of a trial's first stretch. diverges: (trial, epoch). slots: at a time.
    gpus: of each trial. commands: (number of reports, action, its values), the interventions of a user.
    """

    def __init__(
        self,
        sweep,
        searcher,
        scheduler,
        recipe,
        *,
        make_rule=None,
        notifier=None,
        fails=(),
        diverges=(),
        slots=2,
        measures=False,
        gpus=0.0,
        commands=(),
        task=None,
    ):
        self.sweep, self.searcher, self.slots, self.measures = sweep, searcher, slots, measures
        self.fails, self.diverges = dict(fails), set(diverges)
        self.log = EventLog(sweep.path / EVENTS_FILE)
        self.table = make_empty_table(sweep)
        load_space = None if task is None else task.load_space
        history = History(
            sweep, scheduler=scheduler(), table=self.table, command=recipe.format_command, load_space=load_space
        )
        self.now = 0.0
        self.state = SweepController(
            sweep,
            log=self.log,
            history=history,
            searcher=searcher,
            make_stopping_rule=make_rule,
            clock=lambda: self.now,
        )
        logs = open_trial_logs(sweep, self.table)
        self.recorder = Recorder(
            self.table,
            folder=sweep.path,
            retention=history.retention,
            refresh_times=self.state.refresh_times,
            view=SilentView(),
            logs=logs,
            notifier=notifier,
        )
        self.recorder.restore(self.state.past_events)
        self.state.open(num_slots=slots, gpus=gpus, listener=self.recorder)
        self.running = {}
        self.commands = [each for each in commands if each[0] > self.state.history.num_reports]
        self.notes = []
        self.inbox = InterventionInbox(sweep.path, self.state, show_note=self.notes.append)
        self.inbox.process(at_once=True)

    def run(self, num_reports=math.inf):
        """Until nothing is left, a budget is spent, or so many epochs are reported."""
        while num_reports > 0 and not self._is_spent():
            self._steer()
            while (segment := self.state.next_segment()) is not None:
                self.now += 0.002
                if segment.epoch or not self.measures or self._measured(segment):
                    self.running[segment.trial] = (segment, segment.epoch)
            if not self.running and self.state.is_over:
                return
            self.now += 1.25
            if not self.running and self.state.history.is_paused:
                if not self.commands:
                    return
                self.commands[0] = (0, *self.commands[0][1:])  # no report will come before it
            if self.running:
                num_reports -= self._step(min(self.running, key=lambda number: (self.running[number][1], number)))
            self.recorder._next_write = 0.0
            self.recorder.refresh()

    def _steer(self):
        """Give the commands whose time has come, and drop the workers of trials that do not run any more."""
        while self.commands and self.commands[0][0] <= self.state.history.num_reports:
            _, action, values = self.commands.pop(0)
            InterventionFiles(self.sweep.path).write(make_intervention(action, **values))
            time.sleep(0.002)  # the order of the commands is that of their milliseconds
        self.inbox.process(at_once=True)
        for segment, _ in list(self.running.values()):
            if self.state.is_abandoned(segment):
                del self.running[segment.trial]

    def _is_spent(self):
        return self.state.is_budget_spent()

    def _measured(self, segment):
        costs = {"num_parameters": 1e6 * (1 + segment.trial % 4), "latency_ms": 2.5, "memory_mb": 100.0 + segment.trial}
        return self.state.process_costs(segment.trial, costs)

    def _step(self, number):
        segment, epoch = self.running[number]
        epoch += 1
        if segment.segment_number == 1 and (kind := self.fails.get((number, epoch))):
            del self.running[number]
            self.state.process_failure(number, SegmentFailure(kind, "it broke", "Traceback:\nit broke", "vm"))
            return 0
        file = segment.make_checkpoint_path(epoch)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"trial {number} epoch {epoch}")
        checkpoint = describe_checkpoint(file, folder=self.sweep.path, epoch=epoch)
        value = math.nan if (number, epoch) in self.diverges else report_loss(segment.params, epoch, self.sweep)
        metrics = {METRIC: value, "val/pck_auc": 10 / (10 + value)}
        self.running[number] = (segment, epoch)
        start_up_s = 0.5 if epoch == segment.epoch + 1 else 0.0
        seconds = {"start_up": start_up_s, "data": 0.0, "training": 0.6, "validation": 0.1, "report": 0.0}
        self.recorder.add_utilisation(number, Utilisation(seconds, cpu_percent=80.0, memory_mb=900.0))
        goes_on = self.state.process_report(
            number, epoch, metrics, node="vm", resumed_from=segment.epoch, checkpoint=checkpoint
        )
        if goes_on and epoch == (segment.max_epochs or self.sweep.trial_epochs):
            self.state.process_return(number)
            goes_on = False
        if not goes_on:
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

    overrides: of tune.py. space: text of its search space, whose file has the suffix. options: of `SweepProcess`.
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
        task = SweepTask(
            config, self.overrides, list_location_overrides(config), compose_choices(self.overrides), space
        )
        held = find_fixed_params(space, [each.partition("=")[0] for each in self.overrides], task.defaults)
        self.task = replace(task, space=fix_params(space, held), fixed=held)
        self.sweep = instantiate(config.sweep)
        self.origin = collect_provenance(data="0123456789abcdef")
        copy_space(space, folder)
        write_yaml(folder / "sweep.yaml", make_sweep_record(self.task, self.origin))
        self._make_recipe()

    @classmethod
    def from_folder(cls, folder, **options):
        """A sweep that was begun earlier."""
        sweep = cls.__new__(cls)
        sweep.folder, sweep.options = folder, options
        sweep.resume()._make_recipe()
        return sweep

    def _make_recipe(self):
        overrides = select_training_overrides(self.task.overrides)
        overrides = add_checkpoint_metric(overrides, self.task.config, self.sweep.target)
        self.recipe = TrialRecipe(overrides, self.task.locations, self.sweep.max_epochs, 1, 1, self.sweep.folds)

    def resume(self, *given):
        """What `sweep.resume` does before the sweep is opened. given: further overrides."""
        self.task = load_recorded_task(self.folder, given, is_steered=True)
        self.sweep = instantiate(self.task.config.sweep)
        save_budgets(self.task)
        return self

    def process(self, *, is_new=False):
        """The next process that runs it."""
        sweep, config = self.sweep, self.task.config
        first_space = self.task.spaces[0]
        scheduler = bind_scheduler(instantiate(config.scheduler), sweep, first_space)
        searcher = make_searcher(
            instantiate(config.searcher),
            sweep,
            first_space,
            repeats=scheduler().perturbs_params,
            folder=self.folder / "study",
            defaults=self.task.defaults,
            fingerprint="0123456789abcdef",
            resume=not is_new,
        )
        rule = partial(make_stopping_rule, space=self.task.space)
        return SweepProcess(sweep, searcher, scheduler, self.recipe, make_rule=rule, task=self.task, **self.options)

    def run(self, num_reports=math.inf, *, stops=(), last="finished", given=()):
        """Run it to its end, or until so many epochs are reported.

        stops: (number of reports, reason) of processes before the last one, which leaves for the reason `last`. None:
        killed. given: overrides of the later processes.
        """
        process = self.process(is_new=not (self.folder / EVENTS_FILE).exists())
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
        write_winner(
            self.table,
            winner,
            overrides=lambda row: add_param_overrides(self.recipe.overrides, row.params),
            sweep=self.sweep,
            origin=self.origin,
            confirmed=confirmed,
        )
        if retrained:
            self._retrain()
        with contextlib.redirect_stdout(None):
            write_report([self.folder], self.folder / REPORT_FILE)
        return self

    def _confirm(self, num_seeds):
        folder = self.folder / CONFIRM_FOLDER
        chosen = choose_candidates(self.table, defaults=self.task.defaults, top_k=2)
        seeds = choose_fresh_seeds(num_seeds, self.table, self.task.defaults)
        points = list_runs(chosen, seeds)
        sweep = replace(
            self.sweep,
            name=f"{self.sweep.name}/{CONFIRM_FOLDER}",
            folder=str(folder),
            resume=str(self.folder),
            num_trials=len(points),
            second_objective=None,
            time_budget_s=None,
            gpu_hours=None,
            stop_when=None,
        )
        folder.mkdir()
        copy_space(self.task.spaces[0], folder)
        write_yaml(folder / "sweep.yaml", {"confirms": str(self.folder), **self.origin})
        process = SweepProcess(sweep, PointSearcher(points), Fifo, self.recipe)
        process.run()
        process.leave("finished")
        confirmed = summarise_confirmation(chosen, seeds, process.table)
        write_yaml(folder / CONFIRM_FILE, confirmed)
        return confirmed

    def _retrain(self):
        """Write what two seeds leave, and what is combined from them."""
        values = [
            {"test/pa_mpjpe_mm": 9.512, "test/pck_auc": 0.8125, "baseline/pa_mpjpe_mm": 14.25},
            {"test/pa_mpjpe_mm": 9.9, "test/pck_auc": 0.75, "baseline/pa_mpjpe_mm": 14.25},
        ]
        place = self.folder / "retrain"
        self._write_retraining(place, values[0])
        self._write_retraining(place / "seed_1", values[1], "seed=1")
        combined = place / "combined"
        combined.mkdir()
        (combined / "test_preds.json.gz").write_bytes(gzip.compress(b"predictions"))
        content = {"predict": "ensemble", "predicted_by": [0, 1], "seeds": dict(zip("01", values, strict=True))}
        content |= {**summarise_metrics(values), "metrics": {"test/pa_mpjpe_mm": 9.1}}
        (combined / "metrics.json").write_text(json.dumps(content))

    def _write_retraining(self, place, metrics, *changes):
        (place / "checkpoints").mkdir(parents=True)
        best = quote_override("best", str(self.folder / "best.yaml"))
        save_config(compose("train", [best, *changes]), place / "config.yaml")
        overrides = add_param_overrides(self.recipe.overrides, read_yaml(self.folder / "best.yaml")["params"])
        (place / "overrides.json").write_text(json.dumps([*overrides, *changes]))
        with zipfile.ZipFile(place / "checkpoints" / "best-epoch003.ckpt", "w") as archive:
            archive.writestr("data.pkl", "weights" * 1000)
        (place / "test_preds.json.gz").write_bytes(gzip.compress(b"predictions"))
        content = {"checkpoint": str(place / "checkpoints" / "best-epoch003.ckpt"), "metrics": metrics}
        (place / "metrics.json").write_text(json.dumps(content))
