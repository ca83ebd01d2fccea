"""The audit passes healthy sweeps of every kind, and notices every fault that is planted into one of their files."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import sys

import pytest
import yaml

from handpose.errors import UserError
from handpose.sweep.analysis.report import REPORT_FILE, write_report
from handpose.sweep.audit.audit import audit, main
from handpose.sweep.record.events import EVENTS_FORMAT
from tests.sweep.whole_sweep import METRIC, WholeSweep

HALVING = "scheduler.reduction_factor=2"
PROMOTE = "scheduler.mode=promote"
FOLDS = ("sweep.folds=3", "sweep.max_epochs=2")
GRID = "optimizer.lr: choice(0.001, 0.002)\nheatmap.sigma: choice(0.03, 0.05)\n"
EQUAL = "optimizer.lr: choice(1, true, 1.0)\nheatmap.sigma: choice(0, false)\n"
EQUAL_AND_VALID = "trainer.limit_train_batches: choice(1, 1.0)\n+trainer.fast_dev_run: choice(0, false)\n"
FINITE = """
def space(trial):
    params = {"model/decoder": trial.suggest_categorical("model/decoder", ["pyramid", "effpose"])}
    if params["model/decoder"] == "pyramid":
        params["model.decoder.depth"] = trial.suggest_int("model.decoder.depth", 1, 3)
    return params
"""
TWO = ("sweep.second_objective=num_parameters", "searcher.constraints.num_parameters=3500000")
CONDITIONAL = """
def space(trial):
    params = {"model/decoder": trial.suggest_categorical("model/decoder", ["pyramid", "effpose"]),
              "optimizer.lr": trial.suggest_float("rate", 1e-4, 1e-2, log=True)}
    if params["model/decoder"] == "pyramid":
        params["model.decoder.depth"] = trial.suggest_int("model.decoder.depth", 1, 5)
    return params
"""


def rewrite_as_format_2(sweep):
    """As an earlier version wrote the events: a spent budget is `finished`."""
    file = sweep.folder / "events.jsonl"
    file.write_text(file.read_text().replace(f'"version": {EVENTS_FORMAT}', '"version": 2'))


def rewrite_as_format_4(sweep):
    """As the version before reasons left a sweep: no field of its events, no column and no attribute has them."""
    for folder in (file.parent for file in sweep.folder.rglob("events.jsonl")):
        lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        for line in lines:
            for name in ("origin", "trials", "budget", *(["reason"] if line["event"] != "sweep_closed" else [])):
                line.pop(name, None)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "events.jsonl").write_text(text.replace(f'"version": {EVENTS_FORMAT}', '"version": 4'))
        table = list(csv.reader(io.StringIO((folder / "trials.csv").read_text())))
        place = table[0].index("reason")
        with (folder / "trials.csv").open("w", newline="") as file:
            csv.writer(file).writerows([*row[:place], *row[place + 1 :]] for row in table)
    journal = sweep.folder / "study" / "journal.log"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line.get("user_attrs", {}).pop("origin", None)
        line.get("user_attr", {}).get("plan", {}).pop("origins", None)
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if (sweep.folder / REPORT_FILE).is_file():
        with contextlib.redirect_stdout(None):
            write_report([sweep.folder], sweep.folder / REPORT_FILE)
    return sweep


MAKE = {
    "plain": lambda folder: WholeSweep(
        folder, HALVING, "searcher=random", fails={(1, 1): "error"}, diverges={(4, 2)}
    ).run(),
    "stop": lambda folder: (
        WholeSweep(folder, HALVING, "searcher=random", fails={(1, 1): "error"}, diverges={(4, 2)}).run().finish(seeds=2)
    ),
    "promote": lambda folder: (
        WholeSweep(folder, HALVING, PROMOTE, fails={(1, 2): "killed"}).run().finish(seeds=1, retrained=False)
    ),
    "freeze_thaw": lambda folder: (
        WholeSweep(folder, "scheduler=freeze_thaw", "searcher=curves", "sweep.num_trials=9")
        .run(stops=[(8, "interrupted"), (7, None)])
        .finish(seeds=1, retrained=False)
    ),
    "population": lambda folder: (
        WholeSweep(folder, "scheduler=pbt", "scheduler.perturbation_interval=1", slots=3).run().finish(retrained=False)
    ),
    "front": lambda folder: (
        WholeSweep(folder, "scheduler=fifo", *TWO, measures=True).run().finish(seeds=2, retrained=False)
    ),
    "grid": lambda folder: (
        WholeSweep(folder, "scheduler=median", "searcher=grid", "sweep.num_trials=9", space=GRID)
        .run()
        .finish(retrained=False)
    ),
    "conditional": lambda folder: (
        WholeSweep(folder, HALVING, "searcher=random", space=CONDITIONAL, suffix=".py").run().finish(retrained=False)
    ),
    "resumed": lambda folder: (
        WholeSweep(folder, HALVING, PROMOTE)
        .run(stops=[(5, "interrupted"), (3, None), (4, None)], given=["sweep.num_trials=7"])
        .finish(seeds=1, retrained=False)
    ),
    "folds": lambda folder: (
        WholeSweep(folder, "scheduler=fifo", *FOLDS, fails={(1, 4): "killed"}, diverges={(2, 5)})
        .run(stops=[(5, "interrupted"), (6, None)])
        .finish(seeds=1, retrained=False)
    ),
    "folds_promoted": lambda folder: (
        WholeSweep(folder, HALVING, PROMOTE, *FOLDS, fails={(1, 2): "killed"})
        .run(stops=[(5, "interrupted"), (6, None)])
        .finish(seeds=1, retrained=False)
    ),
    "interrupted": lambda folder: WholeSweep(folder, HALVING, PROMOTE).run(num_reports=9, last="interrupted"),
    "killed": lambda folder: WholeSweep(folder, HALVING, "searcher=random").run(num_reports=7, last=None),
    "failing": lambda folder: (
        WholeSweep(folder, "sweep.max_retries=0", fails={(2, 2): "error", (3, 1): "user_error", (0, 3): "preempted"})
        .run()
        .finish(retrained=False)
    ),
    "halted": lambda folder: WholeSweep(
        folder, "sweep.stop_after_failures=2", "sweep.retry_delay_s=60", fails={(0, 1): "error", (1, 1): "error"}
    ).run(last=None),
    "spent": lambda folder: (
        WholeSweep(folder, HALVING, PROMOTE, "sweep.time_budget_s=15")
        .run(last="spent")
        .finish(seeds=2, retrained=False)
    ),
    "gpu_hours": lambda folder: (
        WholeSweep(folder, "scheduler=fifo", "sweep.gpu_hours=0.005", gpus=1.0).run(last="spent").finish()
    ),
    "raised": lambda folder: (
        WholeSweep(folder, HALVING, PROMOTE, "sweep.time_budget_s=15")
        .run(last="spent")
        .finish(retrained=False)
        .resume("sweep.time_budget_s=900", "sweep.num_trials=7")
        .run(stops=[(2, "interrupted")])
        .finish(seeds=2)
    ),
    "raised_only": lambda folder: (
        WholeSweep(folder, HALVING, PROMOTE, "sweep.time_budget_s=15")
        .run(last="spent")
        .finish(retrained=False)
        .resume("sweep.time_budget_s=900", "sweep.num_trials=7")
    ),
    "lowered": lambda folder: (
        WholeSweep(folder, HALVING, PROMOTE, "sweep.time_budget_s=15")
        .run(last="spent")
        .resume("sweep.time_budget_s=null", "sweep.num_trials=2")
        .run()
        .finish(retrained=False)
    ),
    "spent_in_format_2": lambda folder: rewrite_as_format_2(
        WholeSweep(folder, "sweep.time_budget_s=9", "scheduler=fifo").run().finish(retrained=False)
    ),
    "format_4": lambda folder: rewrite_as_format_4(
        WholeSweep(folder, HALVING, PROMOTE, fails={(1, 2): "killed"}).run().finish(seeds=1, retrained=False)
    ),
    "format_4_resumed": lambda folder: (
        rewrite_as_format_4(WholeSweep(folder, HALVING, PROMOTE).run(num_reports=9, last="interrupted"))
        .resume()
        .run()
        .finish(retrained=False)
    ),
    "steered": lambda folder: (
        WholeSweep(
            folder,
            HALVING,
            PROMOTE,
            "searcher.points_to_evaluate=[{optimizer.lr: 0.002},{optimizer.lr: 0.003}]",
            commands=[
                (1, "add", {"params": {"optimizer.lr": 0.004}}),
                (2, "keep", {"trial": 1}),
                (3, "stop", {"trial": 0}),
                (4, "pause", {}),
                (5, "resume", {}),
                (6, "trials", {"limits": {"num_trials": 7}}),
                (7, "slots", {"limits": {"max_concurrent": 1}}),
                (8, "budget", {"limits": {"time_budget_s": 500.0}}),
            ],
        )
        .run()
        .finish(seeds=1, retrained=False)
    ),
    "steered_and_killed": lambda folder: (
        WholeSweep(
            folder,
            HALVING,
            "searcher=random",
            commands=[
                (2, "add", {"params": {"heatmap.sigma": 0.05}}),
                (3, "trials", {"limits": {"num_trials": 8}}),
                (6, "budget", {"limits": {"time_budget_s": 500.0}}),
            ],
        )
        .run(stops=[(4, "interrupted"), (4, None)], given=["sweep.time_budget_s=900"])
        .finish(retrained=False)
    ),
    "reopened": lambda folder: (
        WholeSweep(
            folder,
            HALVING,
            "searcher=random",
            "sweep.max_retries=0",
            fails={(2, 2): "error"},
            commands=[
                (6, "retry", {"trial": 2}),
                (8, "stop", {"trial": 2}),
                (9, "keep", {"trial": 2}),
                (10, "keep", {"trial": 1}),
            ],
        )
        .run()
        .finish(retrained=False)
    ),
    "max": lambda folder: (
        WholeSweep(folder, HALVING, "searcher=random", "sweep.metric=val/pck_auc", diverges={(4, 2)})
        .run()
        .finish(seeds=2, retrained=False)
    ),
    "held": lambda folder: (
        WholeSweep(folder, "scheduler=fifo", "heatmap.sigma=0.04", "sweep.num_trials=9", space=GRID)
        .run()
        .finish(seeds=2, retrained=False)
    ),
    "held_conditional": lambda folder: (
        WholeSweep(folder, HALVING, "model/decoder=pyramid", space=CONDITIONAL, suffix=".py")
        .run()
        .finish(retrained=False)
    ),
    "equal": lambda folder: WholeSweep(folder, "scheduler=fifo", "sweep.num_trials=9", space=EQUAL).run(),
    "equal_confirmed": lambda folder: (
        WholeSweep(folder, "scheduler=fifo", "sweep.num_trials=9", space=EQUAL_AND_VALID)
        .run()
        .finish(seeds=2, retrained=False)
    ),
    "finite_conditional": lambda folder: (
        WholeSweep(folder, "sweep.num_trials=9", space=FINITE, suffix=".py").run().finish(retrained=False)
    ),
    "finite_population": lambda folder: (
        WholeSweep(folder, "scheduler=pbt", "scheduler.perturbation_interval=1", space=GRID, slots=3)
        .run()
        .finish(retrained=False)
    ),
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a sweep of a kind, moved after it was made."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("sweeps") / kind
            MAKE[kind](folder)
            made[kind] = folder.rename(folder.parent / f"{kind}_moved")
        return made[kind]

    return of


def list_texts(found):
    return [text for kind in found for text in kind]


@contextlib.contextmanager
def change_file(folder, name, change):
    """The file of that name, changed for a block; `change`: of its bytes, None: it is gone."""
    file = next(iter(sorted(folder.glob(name))))
    content, times = file.read_bytes(), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    new = change(content)
    assert new != content, "nothing was changed"
    if new is None:
        file.unlink()
    else:
        file.write_bytes(new)
    try:
        yield
    finally:
        file.write_bytes(content)
        os.utime(file, ns=times)


# --- ways to change a file --------------------------------------------------------------------------------------------


def remove_content(content):
    return None


def truncate(content):
    return content[: len(content) // 2]


def flip_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def find_line(lines, wanted):
    """The place of the first JSON line with these values."""
    return next(i for i, line in enumerate(lines) if wanted.items() <= json.loads(line).items())


def change_lines(change, *, place=None, **wanted):
    """Change the list of lines; place: of a line, else of the first JSON line with the values wanted."""

    def on(content):
        split = content.decode().splitlines(keepends=True)
        at = find_line(split, wanted) if wanted else place
        change(split, at)
        return "".join(split).encode()

    return on


def remove_line(place=None, **wanted):
    return change_lines(lambda split, at: split.pop(at), place=place, **wanted)


def repeat_line(place=None, **wanted):
    return change_lines(lambda split, at: split.insert(at, split[at]), place=place, **wanted)


def swap_lines(place=None, **wanted):
    def swap(split, at):
        split[at], split[at + 1] = split[at + 1], split[at]

    return change_lines(swap, place=place, **wanted)


def set_value(values, path, new):
    *parents, last = path
    for key in parents:
        values = values[key]
    last = int(last) if isinstance(values, list) else last
    values[last] = new(values[last]) if callable(new) else new


def change_event(path, new, **wanted):
    """Change a value of a JSON line."""

    def change(split, at):
        values = json.loads(split[at])
        set_value(values, path.split("|"), new)
        split[at] = json.dumps(values) + "\n"

    return change_lines(change, **wanted)


def change_yaml(path, new):
    """Change a value of a YAML file; keys are between bars."""

    def on(content):
        values = yaml.safe_load(content)
        set_value(values, [int(key) if key.isdigit() else key for key in path.split("|")], new)
        return yaml.safe_dump(values, sort_keys=False).encode()

    return on


def change_json(path, new):
    """The same of a JSON file."""

    def on(content):
        values = json.loads(content)
        set_value(values, path.split("|"), new)
        return json.dumps(values).encode()

    return on


def change_cell(column, new, row=2):
    """Change a cell of trials.csv."""

    def on(content):
        table = list(csv.reader(io.StringIO(content.decode())))
        table[row][table[0].index(column)] = new
        out = io.StringIO()
        csv.writer(out).writerows(table)
        return out.getvalue().encode()

    return on


def replace_text(old, new):
    return lambda content: content.replace(old.encode(), new.encode(), 1)


EVENTS, CSV, JOURNAL = "events.jsonl", "trials.csv", "study/journal.log"
CONFIRM, RUNS = "confirm/confirm.yaml", "confirm/events.jsonl"

FAULTS = [
    # the order of events
    ("plain", EVENTS, remove_line(0), r"events.jsonl: line 1 is the first event, but .* must be 'sweep_opened'"),
    (
        "plain",
        EVENTS,
        remove_line(event="trial_suggested", trial=3),
        r"events.jsonl: line \d+ is about trial 3, which no line",
    ),
    (
        "plain",
        EVENTS,
        remove_line(event="segment_started", trial=3),
        r"events.jsonl: line \d+ has 'epoch_reported' of trial 3, which is waiting",
    ),
    (
        "folds",
        EVENTS,
        change_event(f"metrics|{METRIC}", lambda value: value + 1e-9, event="epoch_reported", trial=0, epoch=5),
        r"reports other metrics at epoch 5 of trial 0 than at the end of fold 2, epoch 4",
    ),
    (
        "folds",
        "sweep.yaml",
        replace_text("  folds: 3", "  folds: 2"),
        r"sweep.yaml has sweep.folds=2, but configs/ now gives 3",
    ),
    (
        "folds",
        RUNS,
        change_event(f"metrics|{METRIC}", 9.5, event="epoch_reported", trial=1, epoch=3),
        r"confirm/events.jsonl: .*reports other metrics at epoch 3 of trial 1 than at the end of fold 1, epoch 2",
    ),
    (
        "stop",
        EVENTS,
        lambda content: content.replace(METRIC.encode(), b"val/pa_mpjpe_cm"),
        r"confirm.yaml exists, but no trial of the sweep has a value",
    ),
    (
        "plain",
        EVENTS,
        remove_line(event="epoch_reported", epoch=2),
        r"reports epoch 3 of trial \d after epoch 1, but the report of epoch 2 is missing",
    ),
    (
        "plain",
        EVENTS,
        remove_line(event="segment_failed"),
        r"events.jsonl: line \d+ has 'segment_started' of trial 1, which is running at that point",
    ),
    (
        "stop",
        EVENTS,
        remove_line(event="sweep_closed"),
        r"best.yaml exists, but according to events.jsonl the sweep has not ended",
    ),
    ("plain", EVENTS, repeat_line(event="sweep_opened"), r"events.jsonl: line 2 repeats the 'sweep_opened' event"),
    ("plain", EVENTS, repeat_line(event="trial_suggested", trial=2), r"events.jsonl: line \d+ suggests trial 2 again"),
    (
        "plain",
        EVENTS,
        repeat_line(event="segment_started", trial=2),
        r"events.jsonl: line \d+ has 'segment_started' of trial 2, which is running",
    ),
    (
        "plain",
        EVENTS,
        repeat_line(event="epoch_reported", epoch=2),
        r"events.jsonl: line \d+ reports epoch 2 of trial \d, which has already",
    ),
    ("plain", EVENTS, repeat_line(event="sweep_closed"), r"events.jsonl: line \d+ follows 'sweep_closed'"),
    (
        "plain",
        EVENTS,
        swap_lines(event="trial_suggested", trial=2),
        r"events.jsonl: line \d+ is about trial 2, which no line",
    ),
    ("plain", EVENTS, swap_lines(event="segment_started", trial=4), r"events.jsonl: line \d+"),
    ("plain", EVENTS, truncate, r"events.jsonl: line \d+ is incomplete: it has no line break"),
    ("plain", EVENTS, remove_content, r"events.jsonl is missing"),
    (
        "plain",
        EVENTS,
        change_event("event", "teleported", event="segment_started", trial=2),
        r"events.jsonl: line \d+ has an event 'tel",
    ),
    (
        "plain",
        EVENTS,
        change_event("version", 99, event="sweep_opened"),
        r"events.jsonl: line 1 starts events of format 99",
    ),
    (
        "plain",
        EVENTS,
        change_event("trial", 17, event="epoch_reported", epoch=2),
        r"events.jsonl: line \d+ is about trial 17",
    ),
    (
        "plain",
        EVENTS,
        change_event("trial", 9, event="trial_suggested", trial=3),
        r"events.jsonl: line \d+ suggests trial 9, but the next trial is 3",
    ),
    # times
    (
        "plain",
        EVENTS,
        change_event("at", 0.001, event="epoch_reported", epoch=2),
        r"events.jsonl: line \d+ has the time .* which is earlier than the time of the line before",
    ),
    ("plain", EVENTS, change_event("at", lambda at: at + 0.4, event="epoch_reported", epoch=2), r"events.jsonl"),
    (
        "plain",
        EVENTS,
        change_event("at", -1.0, event="sweep_opened"),
        r"events.jsonl: line 1 has the time -1.0 s, but the time of an event is never negative",
    ),
    # what events say
    (
        "plain",
        EVENTS,
        change_event("num_trials", 7, event="sweep_opened"),
        r"events.jsonl: line 1 opens the sweep with 7 trials, but the configuration has",
    ),
    (
        "plain",
        EVENTS,
        change_event("params|optimizer.lr", 0.0011, event="trial_suggested", trial=3),
        r"events.jsonl: line \d+ suggests trial 3 with other parameters than the study has",
    ),
    (
        "plain",
        EVENTS,
        change_event("segment", 2, event="segment_started", trial=3),
        r"events.jsonl: line \d+ starts trial 3 with segment 2, but its next segment is 1",
    ),
    (
        "plain",
        EVENTS,
        change_event("epoch", 1, event="segment_started", trial=3),
        r"events.jsonl: line \d+ starts trial 3 at epoch 1, but it has no checkpoint",
    ),
    (
        "plain",
        EVENTS,
        change_event("gpus", 0.5, event="segment_started", trial=3),
        r"events.jsonl: line \d+ starts trial 3 with gpus=0.5, but",
    ),
    (
        "plain",
        EVENTS,
        change_event("epoch", 3, event="epoch_reported", epoch=1),
        r"reports epoch 3 of trial \d after epoch 0, but the report of epoch 1 is missing",
    ),
    (
        "plain",
        EVENTS,
        change_event("resumed_from", 1, event="epoch_reported", epoch=2),
        r"events.jsonl: line \d+ .* resumed from epoch 1",
    ),
    (
        "plain",
        EVENTS,
        change_event("node", "other", event="epoch_reported", epoch=2),
        r"events.jsonl: line \d+ .* from node other",
    ),
    ("plain", EVENTS, change_event(f"metrics|{METRIC}", 12.5, event="epoch_reported", epoch=2), r"journal.log.*12.5"),
    (
        "plain",
        EVENTS,
        change_event("metrics|val/pck_auc", 0.4, event="epoch_reported", epoch=2),
        r"lacks val/pck_auc.*events.jsonl",
    ),
    (
        "plain",
        EVENTS,
        change_event("checkpoint|file", lambda name: name.replace("0002", "0001"), event="epoch_reported", epoch=2),
        r"events.jsonl: line \d+ names checkpoints/.* as the checkpoint of trial",
    ),
    ("plain", EVENTS, change_event("checkpoint|epoch", 1, event="epoch_reported", epoch=2), r"events.jsonl: line \d+"),
    (
        "plain",
        EVENTS,
        change_event("checkpoint|checksum", 7, event="epoch_reported", epoch=4, trial=0),
        r"checkpoints/trial_0000/",
    ),
    # decisions
    (
        "plain",
        EVENTS,
        change_event("decision", "stop", event="epoch_reported", decision="continue"),
        r"events.jsonl: line \d+ records the decision",
    ),
    (
        "plain",
        EVENTS,
        change_event("decision", "continue", event="epoch_reported", decision="stop"),
        r"events.jsonl: line \d+ records the decision",
    ),
    (
        "plain",
        EVENTS,
        change_event("decision", "stop", event="epoch_reported", decision="complete"),
        r"events.jsonl: line \d+ records the decision",
    ),
    (
        "plain",
        EVENTS,
        change_event("decision", "stop", event="epoch_reported", decision="diverged"),
        r"events.jsonl: line \d+ records the decision",
    ),
    (
        "plain",
        EVENTS,
        change_event("retry", False, event="segment_failed"),
        r"events.jsonl: line \d+ does not retry trial 1 after the failure 'error', but the settings require a retry",
    ),
    (
        "failing",
        EVENTS,
        change_event("retry", True, event="segment_failed", kind="error"),
        r"events.jsonl: line \d+ retries trial 2 after the failure 'error', but the settings require no retry",
    ),
    (
        "failing",
        EVENTS,
        change_event("kind", "error", event="segment_failed", kind="preempted"),
        r"events.jsonl: line \d+ retries trial",
    ),
    (
        "plain",
        EVENTS,
        change_event("gpus", 1.0, event="segment_failed"),
        r"events.jsonl: line \d+ assigns gpus=1.0 to trial 1",
    ),
    (
        "failing",
        EVENTS,
        change_event("node", "other", event="segment_failed", trial=2),
        r"events.jsonl: line \d+ records a failure of trial 2 on node",
    ),
    (
        "stop",
        EVENTS,
        change_event("reason", "interrupted", event="sweep_closed"),
        r"best.yaml exists, but according to events.jsonl",
    ),
    (
        "halted",
        EVENTS,
        change_event("reason", "interrupted", event="sweep_closed"),
        r"events.jsonl: line \d+ records a failure of trial 1, after which the sweep must be halted, but is not",
    ),
    (
        "interrupted",
        EVENTS,
        change_event("reason", "finished", event="sweep_closed"),
        r"events.jsonl: line \d+ closes the sweep as",
    ),
    (
        "interrupted",
        EVENTS,
        change_event("reason", "halted", event="sweep_closed"),
        r"events.jsonl: line \d+ closes the sweep as",
    ),
    (
        "promote",
        EVENTS,
        change_event("decision", "continue", event="epoch_reported", decision="pause"),
        r"events.jsonl: line \d+ records the decision 'continue' on epoch \d of trial \d, but .* 'pause'",
    ),
    ("promote", EVENTS, swap_lines(event="segment_started", epoch=1), r"events.jsonl: line \d+"),
    (
        "promote",
        EVENTS,
        change_event("cause", "tired", event="trial_ended"),
        r"events.jsonl: line \d+ ends trial \d with .*'tired', but a trial that is paused",
    ),
    ("promote", EVENTS, change_event("state", "failed", event="trial_ended"), r"events.jsonl: line \d+ ends trial \d"),
    ("population", EVENTS, change_event("source", 0, event="segment_started", segment=2), r"events.jsonl: line \d+"),
    (
        "front",
        EVENTS,
        change_event("decision", "continue", event="costs_measured", decision="infeasible"),
        r"records the decision 'continue' on the costs",
    ),
    (
        "front",
        EVENTS,
        change_event("decision", "infeasible", event="costs_measured", decision="continue"),
        r"records the decision 'infeasible' on the costs",
    ),
    ("front", EVENTS, change_event("costs|latency_ms", 9.0, event="costs_measured"), r"latency_ms"),
    ("front", EVENTS, remove_line(event="costs_measured", trial=1), r"num_parameters"),
    # reasons
    (
        "plain",
        EVENTS,
        change_event("reason|cutoff", 12.5, event="epoch_reported", decision="stop"),
        r"events.jsonl: line \d+ records the reason \(rule='rung', .*cutoff=12.5,.*\) for epoch \d of trial \d, but",
    ),
    (
        "plain",
        EVENTS,
        change_event("reason", None, event="epoch_reported", decision="diverged"),
        r"events.jsonl: line \d+ records the reason \(none\) for epoch 2 of trial 4, but it is \(rule='not_finite'\)",
    ),
    (
        "plain",
        EVENTS,
        change_event("reason|value", 2, event="segment_failed"),
        r"line \d+ records the reason \(rule='retries', value=2,.*\) for the failure of trial 1, but it is .*value=1",
    ),
    (
        "promote",
        EVENTS,
        change_event("reason|rank", 9, event="segment_started", segment=2, trial=0),
        r"events.jsonl: line \d+ records the reason .*rank=9.* for the promotion of a trial, but it is",
    ),
    (
        "promote",
        EVENTS,
        change_event("reason|rule", "returned", event="trial_ended"),
        r"events.jsonl: line \d+ records the reason \(rule='returned'\) for the end of trial \d, but it is",
    ),
    (
        "front",
        EVENTS,
        change_event("reason|cutoff", 1e6, event="costs_measured", decision="infeasible"),
        r"events.jsonl: line \d+ records the reason .*cutoff=1000000.0.* for the costs of trial \d, but it is",
    ),
    (
        "spent",
        EVENTS,
        change_event("budget|cutoff", 20.0, event="sweep_closed"),
        r"events.jsonl: line \d+ records the reason .*cutoff=20.0\) for closing the sweep, but it is .*cutoff=15",
    ),
    (
        "plain",
        EVENTS,
        change_event("origin", "a dream", event="trial_suggested", trial=3),
        r"journal.log: trial 3 is 'RandomSampler', but events.jsonl has 'a dream'",
    ),
    (
        "plain",
        CSV,
        change_cell("reason", "rung at epoch 1: PA-MPJPE 1.00 mm"),
        r"trials.csv: trial 1 has reason='rung at epoch 1: PA-MPJPE 1.00 mm', but events.jsonl gives 'rung",
    ),
    ("plain", CSV, change_cell("reason", ""), r"trials.csv: trial 1 has reason='', but events.jsonl gives 'rung"),
    # budgets
    (
        "spent",
        EVENTS,
        change_event("reason", "finished", event="sweep_closed"),
        r"line \d+ closes the sweep as finished, but tri",
    ),
    (
        "spent",
        EVENTS,
        change_event("reason", "interrupted", event="sweep_closed"),
        r"best.yaml exists, but according to events.jsonl",
    ),
    (
        "spent",
        EVENTS,
        change_event("reason", "halted", event="sweep_closed"),
        r"events.jsonl: line \d+ closes the sweep as halted",
    ),
    (
        "gpu_hours",
        EVENTS,
        change_event("reason", "finished", event="sweep_closed"),
        r"line \d+ closes the sweep as finished, but",
    ),
    (
        "plain",
        EVENTS,
        change_event("reason", "spent", event="sweep_closed"),
        r"line \d+ closes .* spent budget, but no trial is left to run",
    ),
    (
        "stop",
        EVENTS,
        change_event("reason", "spent", event="sweep_closed"),
        r"line \d+ closes .* spent budget, but no budget is",
    ),
    (
        "promote",
        EVENTS,
        change_event("reason", "spent", event="sweep_closed"),
        r"line \d+ closes .* spent budget, but no trial is left to run",
    ),
    (
        "interrupted",
        EVENTS,
        change_event("reason", "spent", event="sweep_closed"),
        r"line \d+ closes .* but no budget is spent",
    ),
    (
        "raised",
        EVENTS,
        change_event("reason", "finished", event="sweep_closed"),
        r"line \d+ closes the sweep as finished, but trial",
    ),
    (
        "raised",
        EVENTS,
        change_event("reason", "spent", reason="finished"),
        r"line \d+ closes .* spent budget, but no trial is left to run",
    ),
    (
        "raised",
        EVENTS,
        change_event("num_trials", 2, event="sweep_opened"),
        r"suggests trial 2, but the sweep has only 2 trials",
    ),
    (
        "lowered",
        EVENTS,
        change_event("num_trials", 6, num_trials=2),
        r"opens the sweep with 6 trials, but the configuration has",
    ),
    (
        "spent_in_format_2",
        EVENTS,
        replace_text('"version": 2', '"version": 3'),
        r"finishes the sweep, but \d trials have not been started",
    ),
    (
        "held",
        EVENTS,
        change_event("num_trials", 9, event="sweep_opened"),
        r"opens the sweep with 9 trials, but the configuration has 2",
    ),
    (
        "spent",
        "sweep.yaml",
        change_yaml("config|sweep|time_budget_s", 99),
        r"sweep.yaml: config has sweep.time_budget_s=99",
    ),
    # trials.csv
    (
        "plain",
        CSV,
        change_cell(METRIC, "12.5"),
        rf"trials.csv: trial 1 has {METRIC}='12.5', but events.jsonl gives '\d+",
    ),
    ("plain", CSV, change_cell("optimizer.lr", "0.0011"), r"trials.csv: trial 1 has optimizer.lr='0.0011'"),
    ("plain", CSV, change_cell("state", "failed", row=3), r"trials.csv: trial 2 has state='failed'"),
    ("plain", CSV, change_cell("epochs", "3"), r"trials.csv: trial 1 has epochs='3'"),
    ("plain", CSV, change_cell("seconds", "3.21"), r"trials.csv: trial 1 has seconds='3.21'"),
    ("plain", CSV, change_cell("number", "17"), r"trials.csv has a row of trial 17, which is not in events.jsonl"),
    (
        "plain",
        CSV,
        replace_text("optimizer.lr=", "optimizer.lr=9"),
        r"trials.csv: trial 0 has a command that does not train",
    ),
    ("plain", CSV, remove_line(3), r"trials.csv has no row of trial 2"),
    ("plain", CSV, repeat_line(3), r"trials.csv has 2 rows of trial 2"),
    ("plain", CSV, swap_lines(3), r"trials.csv: the rows are not in the order of the trial numbers"),
    ("plain", CSV, truncate, r"trials.csv is truncated"),
    ("plain", CSV, remove_content, r"trials.csv is missing"),
    ("killed", CSV, change_cell("epochs", "3"), r"trials.csv: trial 1 has epochs='3'"),
    ("front", CSV, change_cell("latency_ms", "9.9"), r"trials.csv: trial 1 has latency_ms='9.9'"),
    # the study
    (
        "plain",
        JOURNAL,
        change_event("params|optimizer.lr", 0.0011, op_code=4),
        r"journal.log: trial 0 has the parameter optimizer.lr",
    ),
    (
        "plain",
        JOURNAL,
        change_event("intermediate_value", 12.5, op_code=7),
        r"journal.log: trial \d has the value 12.5 at epoch",
    ),
    ("plain", JOURNAL, change_event("step", 3, op_code=7, step=1), r"journal.log"),
    (
        "plain",
        JOURNAL,
        change_event("state", 3, op_code=6, state=2),
        r"journal.log: trial \d is FAIL, but stopped according to events.jsonl",
    ),
    (
        "plain",
        JOURNAL,
        change_event("values|0", 12.5, op_code=6, state=1),
        r"journal.log: trial \d has the final values \[12.5\]",
    ),
    ("plain", JOURNAL, remove_line(op_code=7), r"journal.log"),
    ("plain", JOURNAL, remove_line(op_code=6), r"journal.log"),
    ("plain", JOURNAL, repeat_line(op_code=7), r"journal.log: line \d+ repeats the value of trial \d at epoch"),
    ("plain", JOURNAL, repeat_line(op_code=4), r"journal.log"),
    ("plain", JOURNAL, truncate, r"journal.log"),
    ("plain", JOURNAL, remove_content, r"study/journal.log is missing"),
    (
        "equal",
        EVENTS,
        change_event(
            "params|optimizer.lr", lambda lr: True if type(lr) is float else float(lr), event="trial_suggested"
        ),
        r"events.jsonl: line \d+ suggests trial 0 with other parameters than the study has: optimizer.lr is",
    ),
    ("equal", CSV, change_cell("optimizer.lr", "1.00"), r"trials.csv: trial 1 has optimizer.lr='1.00'"),
    (
        "equal",
        JOURNAL,
        change_event("distributions|optimizer.lr", lambda text: text.replace("bool true", "bool false"), op_code=4),
        r"journal.log: trial 0 has optimizer.lr drawn from",
    ),
    (
        "equal",
        JOURNAL,
        change_event("distributions|optimizer.lr", lambda text: text.replace("[1,", "[1.0,"), op_code=4),
        r"journal.log: trial 0 has optimizer.lr drawn from",
    ),
    (
        "equal",
        JOURNAL,
        change_event("params|optimizer.lr", lambda index: (index + 1) % 3, op_code=4),
        r"journal.log: trial 0 has",
    ),
    ("max", JOURNAL, change_event("directions", [1], op_code=0), r"journal.log has the directions"),
    (
        "plain",
        JOURNAL,
        replace_text('"warm_start":[]', '"warm_start":[{"brought":0}]'),
        r"was warm-started from 1 sweeps, but",
    ),
    (
        "plain",
        JOURNAL,
        replace_text('"points":[{"optimizer.lr":0.005', '"points":[{"optimizer.lr":0.004'),
        r"journal.log: trial 0 was enqueued with .*0.005.*, but the plan of the study has .*0.004",
    ),
    (
        "plain",
        JOURNAL,
        replace_text('"points":[{"optimizer.lr":0.005,"heatmap.sigma":0.04}]', '"points":[]'),
        r"journal.log: trial 0 was enqueued with .*, which is not in the plan",
    ),
    (
        "plain",
        JOURNAL,
        replace_text('"fixed_params":{"optimizer.lr":0.005', '"fixed_params":{"optimizer.lr":0.1'),
        r"journal.log: trial 0 has optimizer.lr=0.005, but was enqueued with 0.1",
    ),
    (
        "plain",
        JOURNAL,
        change_event("datetime_start", "2020-01-01T00:00:00+00:00", op_code=4),
        r"journal.log: trial 0 has the date 2020.*, but according to events.jsonl the sweep took \d+ s",
    ),
    # what comes after
    ("stop", CONFIRM, change_yaml("winner_trial", 5), r"confirm/confirm.yaml: winner_trial is 5, but its runs give"),
    ("stop", CONFIRM, change_yaml("seeds|0", 7), r"confirm/confirm.yaml"),
    (
        "stop",
        CONFIRM,
        change_yaml("candidates|0|values|1", 12.5),
        r"confirm/confirm.yaml: candidates.0.values.1 is 12.5",
    ),
    ("stop", CONFIRM, change_yaml("candidates|0|low", 12.5), r"confirm/confirm.yaml: candidates.0.low is 12.5"),
    (
        "stop",
        CONFIRM,
        change_yaml("candidates|0|params|optimizer.lr", 0.0011),
        r"confirm/confirm.yaml: candidates.0.params",
    ),
    ("stop", CONFIRM, change_yaml("optimism", 0.5), r"confirm/confirm.yaml: optimism is 0.5, but its runs give"),
    ("stop", CONFIRM, change_yaml("not_compared", ["trial 3"]), r"confirm/confirm.yaml: not_compared"),
    (
        "stop",
        CONFIRM,
        change_yaml("unknown", {"interval": "it is not"}),
        r"confirm/confirm.yaml: unknown.interval is it is",
    ),
    (
        "promote",
        CONFIRM,
        change_yaml("unknown|interval", "it is not"),
        r"confirm/confirm.yaml: unknown.interval is it is not",
    ),
    ("promote", CONFIRM, change_yaml("unknown", {}), r"confirm/confirm.yaml: unknown.interval is \(missing\)"),
    (
        "promote",
        CONFIRM,
        change_yaml("optimism", 0.0),
        r"confirm/confirm.yaml: optimism is 0.0, but its runs give None",
    ),
    ("max", CONFIRM, change_yaml("mode", "min"), r"confirm/confirm.yaml: mode is min"),
    ("stop", CONFIRM, remove_content, r"confirm/confirm.yaml is missing"),
    ("stop", CONFIRM, truncate, r"confirm/confirm.yaml"),
    ("stop", RUNS, change_event("params|seed", 9, event="trial_suggested", trial=1), r"confirm/events.jsonl: run 1"),
    (
        "stop",
        RUNS,
        change_event("params|optimizer.lr", 0.0011, event="trial_suggested", trial=1),
        r"confirm/events.jsonl: run 1 has param",
    ),
    ("stop", RUNS, change_event(f"metrics|{METRIC}", 12.5, event="epoch_reported", epoch=4), r"confirm/"),
    (
        "stop",
        RUNS,
        remove_line(event="segment_started", trial=1),
        r"confirm/events.jsonl: line \d+ has 'epoch_reported' of trial 1",
    ),
    ("stop", "confirm/trials.csv", change_cell("seed", "9"), r"confirm/trials.csv: trial 1 has seed='9'"),
    (
        "stop",
        "confirm/sweep.yaml",
        change_yaml("data_fingerprint", "other"),
        r"confirm/sweep.yaml has data_fingerprint=other",
    ),
    ("stop", "best.yaml", change_yaml("trial", 5), r"best.yaml: trial is 5"),
    ("stop", "best.yaml", change_yaml("params|optimizer.lr", 0.0011), r"best.yaml: params.optimizer.lr is 0.0011"),
    ("stop", "best.yaml", change_yaml("metric|value", 12.5), r"best.yaml: metric.value is 12.5"),
    ("stop", "best.yaml", change_yaml("metric|high", 12.5), r"best.yaml: metric.high is 12.5"),
    ("stop", "best.yaml", change_yaml("metric|optimism", 0.5), r"best.yaml: metric.optimism is 0.5"),
    ("stop", "best.yaml", change_yaml("not_compared", ["trial 3"]), r"best.yaml: not_compared"),
    ("promote", "best.yaml", change_yaml("unknown|interval", "it is not"), r"best.yaml: unknown.interval is it is not"),
    ("conditional", "best.yaml", change_yaml("unknown", {}), r"best.yaml: unknown"),
    ("max", "best.yaml", change_yaml("metric|mode", "min"), r"best.yaml: metric.mode is min"),
    (
        "max",
        "best.yaml",
        change_yaml("overrides", lambda all_: [each for each in all_ if "checkpoints" not in each]),
        r"best",
    ),
    ("stop", "best.yaml", change_yaml("overrides|1", "optimizer.lr=9"), r"best.yaml: overrides"),
    ("stop", "best.yaml", change_yaml("sweep|seed", 9), r"best.yaml: sweep.seed is 9"),
    ("stop", "best.yaml", change_yaml("configuration|seed", 9), r"best.yaml: configuration.seed is 9"),
    ("stop", "best.yaml", change_yaml("git|revision", "0" * 40), r"best.yaml: git.revision is 000"),
    ("stop", "best.yaml", remove_content, r"best.yaml is missing"),
    ("stop", "best.yaml", truncate, r"best.yaml"),
    ("front", "front/*", change_yaml("costs|num_parameters", 1.0), r"front/trial_0000\d.yaml: costs.num_par"),
    ("front", "front/*", remove_content, r"front/trial_0000\d.yaml is missing"),
    (
        "stop",
        "retrain/overrides.json",
        lambda content: content.replace(b"lr=0.00", b"lr=0.10"),
        r"retrain/overrides.json",
    ),
    (
        "stop",
        "retrain/config.yaml",
        change_yaml("optimizer|lr", 0.5),
        r"retrain/config.yaml has optimizer.lr=0.5, but best",
    ),
    (
        "stop",
        "retrain/metrics.json",
        change_json("metrics|test/pck_auc", 0.99),
        r"retrain/metrics.json has test/pck_auc = 0.99",
    ),
    ("stop", "retrain/checkpoints/best-epoch003.ckpt", flip_byte, r"retrain/checkpoints/best-epoch003.ckpt is damaged"),
    ("stop", "retrain/test_preds.json.gz", truncate, r"retrain/test_preds.json.gz is damaged"),
    ("stop", "retrain/test_preds.json.gz", remove_content, r"retrain/test_preds.json.gz is missing"),
    ("stop", "report.html", truncate, r"report.html is truncated"),
    (
        "stop",
        "report.html",
        replace_text("13.16", "12.16"),
        r"report.html: line \d+, in .*, differs from a report made now",
    ),
    ("stop", "report.html", remove_content, r"report.html is missing, although retrain/metrics.json exists"),
    (
        "stop",
        "retrain/metrics.json",
        change_json("metrics", {"test/pck_auc": 0.8125}),
        r"no metric with the value 9.512, which report",
    ),
    (
        "stop",
        "retrain/metrics.json",
        change_json("metrics", lambda all_: {name: 10 * each for name, each in all_.items()}),
        r"retrain/metrics.json has test/pa_mpjpe_mm = 95.12, which report.html does not show",
    ),
    (
        "stop",
        "retrain/metrics.json",
        change_json("checkpoint", None),
        r"retrain/metrics.json names the checkpoint None, which is missing",
    ),
    (
        "stop",
        "retrain/seed_1/overrides.json",
        lambda content: content.replace(b"seed=1", b"seed=2"),
        r"retrain/seed_1/overrides.json belongs to another configuration",
    ),
    ("stop", "retrain/seed_1/test_preds.json.gz", truncate, r"retrain/seed_1/test_preds.json.gz is damaged"),
    (
        "stop",
        "retrain/seed_1/metrics.json",
        change_json("metrics|test/pck_auc", 0.99),
        r"retrain/combined/metrics.json: mean is .*, but the retrainings give ",
    ),
    (
        "stop",
        "retrain/combined/metrics.json",
        change_json("deviation|test/pck_auc", 0.5),
        r"retrain/combined/metrics.json: deviation is ",
    ),
    ("stop", "retrain/combined/metrics.json", remove_content, r"retrain/combined/metrics.json is missing"),
    ("stop", "retrain/combined/test_preds.json.gz", remove_content, r"retrain/combined/test_preds.json.gz is missing"),
    (
        "stop",
        "retrain/config.yaml",
        change_yaml("best", "/other/best.yaml"),
        r"has best=/other/best.yaml, which belongs to another",
    ),
    (
        "stop",
        "retrain/config.yaml",
        change_yaml("data|batch_size", 3),
        r"retrain/config.yaml has data.batch_size=3, but",
    ),
    (
        "stop",
        "best.yaml",
        change_yaml("command", "python train.py best=/other/best.yaml"),
        r"best.yaml: command is .*other",
    ),
    (
        "stop",
        "best.yaml",
        change_yaml("command", lambda text: text.replace("train.py", "train.py optimizer.lr=3")),
        r"best.yaml: command is .*lr=3",
    ),
    ("stop", "best.yaml", change_yaml("overrides", lambda all_: all_[::-1]), r"best.yaml: overrides.0 is"),
    # what the sweep was
    (
        "stop",
        "sweep.yaml",
        change_yaml("data_fingerprint", "other"),
        r"sweep.yaml has data_fingerprint|best.yaml: data_fing",
    ),
    ("stop", "sweep.yaml", change_yaml("config|sweep|num_trials", 7), r"sweep.yaml: config has sweep.num_trials=7"),
    ("stop", "sweep.yaml", change_yaml("config|sweep|seed", 7), r"sweep.yaml has sweep.seed=7"),
    ("stop", "sweep.yaml", change_yaml("config|optimizer|lr", 0.5), r"sweep.yaml has optimizer.lr=0.5"),
    ("stop", "sweep.yaml", change_yaml("choices", {}), r"sweep.yaml: choices has scheduler=\(missing\)"),
    ("stop", "sweep.yaml", change_yaml("locations", []), r"sweep.yaml: locations has no paths.data, but config has"),
    (
        "stop",
        "sweep.yaml",
        change_yaml("config|search_space", "other.yaml"),
        r"sweep.yaml: config has search_space=other",
    ),
    ("stop", "sweep.yaml", change_yaml("choices|scheduler", "fifo"), r"sweep.yaml: choices has scheduler=fifo"),
    (
        "held",
        "sweep.yaml",
        change_yaml("fixed_params|heatmap.sigma", 0.05),
        r"sweep.yaml: fixed_params has heatmap.sigma=0.05, but its over",
    ),
    (
        "held",
        "sweep.yaml",
        change_yaml("fixed_params|heatmap.sigma", "0.04"),
        r"sweep.yaml: fixed_params has heatmap.sigma=0.04, but its ov",
    ),
    ("held", "sweep.yaml", change_yaml("fixed_params", {}), r"journal.log: trial 0 has no value for heatmap.sigma"),
    ("held", "sweep.yaml", change_yaml("fixed_params|optimizer.lr", 0.001), r"sweep.yaml"),
    (
        "held_conditional",
        "sweep.yaml",
        change_yaml("fixed_params|model/decoder", "effpose"),
        r"sweep.yaml: fixed_params has model/decoder=eff",
    ),
    (
        "held_conditional",
        "sweep.yaml",
        change_yaml("fixed_params", {}),
        r"journal.log: trial 0 has no value for model/decoder",
    ),
    ("max", "sweep.yaml", change_yaml("config|sweep|mode", "min"), r"sweep.yaml.*sweep.mode=min"),
    ("max", "sweep.yaml", change_yaml("config|sweep|metric", METRIC), r"sweep.yaml.*sweep.metric=val/pa_mpjpe_mm"),
    (
        "max",
        "sweep.yaml",
        lambda content: content.replace(b"val/pck_auc", METRIC.encode()),
        r"sweep.yaml has sweep.mode=max, which is the wrong direction of sweep.metric=val/pa_mpjpe_mm",
    ),
    ("stop", "sweep.yaml", change_yaml("format", 99), r"sweep.yaml is of format 99"),
    ("stop", "sweep.yaml", remove_content, r"sweep.yaml"),
    ("stop", "sweep.yaml", truncate, r"sweep.yaml"),
    ("stop", "search_space/stop_space.yaml", replace_text("1e-2", "1e-3"), r"stop_space.yaml"),
    ("stop", "search_space/stop_space.yaml", remove_line(1), r"stop_space.yaml"),
    # interventions of the user
    (
        "steered",
        EVENTS,
        remove_line(event="sweep_steered", action="add"),
        r"suggests trial 2 for the intervention \S+, which is not waiting",
    ),
    ("steered", EVENTS, remove_line(event="trial_steered", action="stop"), r"trials.csv: trial 0 has reason"),
    (
        "reopened",
        EVENTS,
        remove_line(event="trial_steered", action="keep", trial=1),
        r"has 'segment_started' of trial 1, which is stopped",
    ),
    ("steered", EVENTS, repeat_line(event="trial_steered", action="keep"), r"executes the intervention \S+ again"),
    (
        "steered",
        EVENTS,
        change_event("trial", 2, event="trial_steered", action="keep"),
        r"records the decision|but the promotion|'pause'",
    ),
    (
        "steered",
        EVENTS,
        change_event("limits|num_trials", 9, event="sweep_steered", action="trials"),
        r"finishes the sweep, but 2 trials have not been started",
    ),
    (
        "steered",
        EVENTS,
        change_event("limits", {"seed": 9}, event="sweep_steered", action="budget"),
        r"which may change only time_budget_s, gpu_hours, stop_when",
    ),
    (
        "steered",
        EVENTS,
        change_event("params|optimizer.lr", 0.006, event="sweep_steered", action="add"),
        r"trial 2 was enqueued with .*0.004.*, but the user has added .*0.006",
    ),
    ("steered", EVENTS, change_event("added_by", "", event="trial_suggested", trial=2), r"added comes next"),
    (
        "steered",
        EVENTS,
        remove_line(event="sweep_steered", action="resume"),
        r"starts trial \d, but the user has paused the sweep",
    ),
]


@pytest.mark.parametrize("kind", MAKE)
def test_a_healthy_sweep_has_no_findings(swept, kind):
    folder = swept(kind)
    assert list_texts(audit(folder)) == []


def test_the_sweeps_have_all_that_can_become_of_a_trial(swept):
    rows = [row for kind in MAKE for row in csv.DictReader((swept(kind) / CSV).read_text().splitlines())]
    states = {row["state"] for row in rows}
    assert states >= {"complete", "stopped", "diverged", "infeasible", "failed", "paused", "waiting"}
    events = [json.loads(line) for kind in MAKE for line in (swept(kind) / EVENTS).read_text().splitlines()]
    named = {each["event"] for each in events}
    assert named >= {
        "sweep_opened",
        "trial_suggested",
        "segment_started",
        "costs_measured",
        "epoch_reported",
        "segment_failed",
        "trial_ended",
        "sweep_closed",
        "trial_steered",
        "sweep_steered",
    }


@pytest.mark.parametrize(("kind", "name", "change", "finding"), FAULTS)
def test_a_fault_is_found_with_its_file_and_place(swept, kind, name, change, finding):
    folder = swept(kind)
    with change_file(folder, name, change):
        found = list_texts(audit(folder))
    assert any(re.search(finding, text) for text in found), found


def test_every_checkpoint_that_was_not_removed_is_missed_and_seen_to_be_damaged(swept):
    folder = swept("interrupted")
    held = sorted(file.relative_to(folder).as_posix() for file in (folder / "checkpoints").rglob("*.ckpt"))
    assert len(held) >= 4
    for name in (held[0], held[-1]):
        for change, said in ((remove_content, "is missing"), (flip_byte, "is damaged"), (truncate, "is damaged")):
            with change_file(folder, name, change):
                assert [text.partition(",")[0].partition(":")[0] for text in list_texts(audit(folder))] == [
                    f"{name} {said}"
                ]


def test_every_file_of_tensorboard_is_missed_and_compared(swept):
    folder = swept("plain")
    for file in sorted((folder / "tensorboard" / "trial_0000").iterdir()):
        for change in (remove_content, truncate):
            with change_file(folder, file.relative_to(folder).as_posix(), change):
                assert any("tensorboard/trial_0000" in text for text in list_texts(audit(folder))), (file.name, change)


def test_a_trial_whose_folder_was_renamed_is_found(swept):
    folder = swept("plain") / "tensorboard"
    (folder / "trial_0001").rename(folder / "trial_0099")
    try:
        found = list_texts(audit(folder.parent))
    finally:
        (folder / "trial_0099").rename(folder / "trial_0001")
    assert {"tensorboard/trial_0099 belongs to no trial that was started", "tensorboard/trial_0001 is missing"} == {
        *found
    }


def test_a_promotion_that_should_have_come_first_is_found(swept, tmp_path):
    """A trial is asked for before the promotion that the file has there: both lines come later, in order."""
    folder = tmp_path / "promoted"
    shutil.copytree(swept("promote"), folder)
    split = (folder / EVENTS).read_text().splitlines(keepends=True)
    begun = [
        i
        for i, line in enumerate(split)
        if json.loads(line)["event"] == "segment_started" and json.loads(line)["epoch"]
    ]
    asked = next(i for i, line in enumerate(split) if json.loads(line)["event"] == "trial_suggested" and i > begun[0])
    at = json.loads(split[begun[0]])["at"]
    moved = [json.dumps(json.loads(line) | {"at": at}) + "\n" for line in split[asked : asked + 2]]
    split = [*split[: begun[0]], *moved, *split[begun[0] : asked], *split[asked + 2 :]]
    (folder / EVENTS).write_text("".join(split))
    found = list_texts(audit(folder))
    assert any("suggests a new trial, but trial" in text and "must be promoted first" in text for text in found)


def test_a_trial_that_waits_may_have_replaced_a_checkpoint_by_one_that_was_not_reported(tmp_path):
    """A resumed sweep finds the newer one, and removes the oldest; then the trial is stopped before it runs again."""
    folder = tmp_path / "sweep"
    WholeSweep(folder, "scheduler=fifo", "searcher=random", slots=1).run(num_reports=3, last=None)
    lines = (folder / "events.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    newest = last.pop("checkpoint")["file"]
    (folder / "events.jsonl").write_text("\n".join([*lines[:-1], json.dumps({**last, "checkpoint": None})]) + "\n")
    (folder / "checkpoints/trial_0000/epoch_0001_segment_1.ckpt").write_text("trial 0 epoch 1")
    sweep = WholeSweep.from_folder(folder)
    sweep.process().leave()
    assert sorted(file.name for file in (folder / newest).parent.iterdir()) == [
        "epoch_0002_segment_1.ckpt",
        "epoch_0003_segment_1.ckpt",
    ]
    assert audit(folder).lost == []
    (folder / newest).unlink()
    assert len(audit(folder).lost) == 1, "without the newer one, the oldest must be there"


def test_a_folder_without_a_sweep_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="has no sweep"):
        audit(tmp_path)


def test_the_command_line_prints_the_findings_and_has_status_1(swept, monkeypatch, capsys):
    folder = swept("killed")
    monkeypatch.setattr(sys, "argv", ["audit", str(folder)])
    with change_file(folder, CSV, remove_content), pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 1
    assert capsys.readouterr().out.splitlines() == ["lost: 1", "  trials.csv is missing", "repeated: 0", "wrong: 0"]
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
