"""Audits what follows the trials of a sweep, from the confirmation to the next search space, by making it again."""

import gzip
import html
import itertools
import math
import re
import shlex
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from handpose.config import parse_override_value
from handpose.errors import UserError
from handpose.evaluation.submission import PREDICTIONS_FILE
from handpose.files import read_json
from handpose.metrics.validation import is_measured_in_image_only
from handpose.report.trial_table import TrialTable
from handpose.schedulers.scheduler import Fifo
from handpose.sweep.analysis.read_sweep import COMBINED_FOLDER
from handpose.sweep.analysis.report import NEXT_SPACE_FILE, REPORT_FILE, render_report
from handpose.sweep.audit.events import (
    ABSENT_VALUE,
    AuditFinding,
    Expectations,
    Lost,
    Repeated,
    ReplayResult,
    Wrong,
    find_differences,
    is_same_value,
    replay_events,
)
from handpose.sweep.audit.records import AuditedSweep, audit_trial_files, is_truncated
from handpose.sweep.driver.resume import SweepTask
from handpose.sweep.record.events import EVENTS_FILE
from handpose.sweep.record.provenance import PROCESS_MB, read_git_state, select_configuration
from handpose.sweep.record.settings import SweepSettings
from handpose.sweep.selection.confirm import (
    CONFIRM_FILE,
    CONFIRM_FOLDER,
    choose_candidates,
    choose_fresh_seeds,
    list_runs,
    summarise_confirmation,
)
from handpose.sweep.selection.retrain_seeds import summarise_metrics
from handpose.sweep.selection.winner import NoWinnerError, drop_seed, select_winner, write_winner
from handpose.sweep.trainable.trial import add_param_overrides
from handpose.yaml_files import read_yaml

_RUNS, _CONFIRMED = f"{CONFIRM_FOLDER}/{EVENTS_FILE}", f"{CONFIRM_FOLDER}/{CONFIRM_FILE}"
_BEST, _PREDICTIONS, _ARCHIVE = "best.yaml", PREDICTIONS_FILE, "pred.zip"


def audit_results(audited: AuditedSweep, replayed: ReplayResult) -> Iterator[AuditFinding]:
    """Compare all files that were made from a sweep's table with what the table gives now."""
    task, sweep, folder = audited.task, audited.settings, audited.settings.path
    confirming = _audit_confirm_sweep(audited)
    yield from confirming.findings
    yield from _find_unless_outdated(partial(_audit_winner_files, audited, confirming), replayed)
    settings = ("sweep.yaml", f"{CONFIRM_FOLDER}/sweep.yaml", "retrain/config.yaml")
    for name in (*settings, _BEST, _CONFIRMED, NEXT_SPACE_FILE, REPORT_FILE):
        if is_truncated(folder / name):
            yield Wrong(f"{name} is truncated: its last line has no line break")
    yield from _audit_retrainings(folder, sweep)
    yield from _audit_report(folder, task)


def _find_unless_outdated(check: Any, replayed: ReplayResult) -> list[AuditFinding]:
    """Return the findings of a check with the table at the sweep's latest end.

    A sweep that was continued with more trials or a larger budget has ended more than once, and the later files may
    still belong to an earlier end. If the check finds nothing with the table of any end, the result is empty.
    """
    tables: Sequence[TrialTable | None] = replayed.final_tables[::-1] or [None]
    found = [list(check(table, is_over=replayed.is_ended)) for table in tables]
    return found[0] if all(found) else []


# --- the confirmation -------------------------------------------------------------------------------------------------


def _audit_confirm_sweep(audited: AuditedSweep) -> ReplayResult:
    """Audit the runs of a confirmation, which are the trials of a separate sweep."""
    task, sweep = audited.task, audited.settings
    folder, label = sweep.path / CONFIRM_FOLDER, f"{CONFIRM_FOLDER}/"
    kept = folder / "sweep.yaml"
    record, problem = _read_description(kept)
    # The user may have raised the number of epochs since.
    epochs = record.get("epochs", sweep.trial_epochs)
    changed = sweep.change_trial_epochs(epochs)
    recipe = replace(audited.recipe, max_epochs=changed.max_epochs)
    settings = replace(
        changed,
        folder=str(folder),
        second_objective=None,
        time_budget_s=None,
        gpu_hours=None,
        stop_when=None,
        gpus_per_trial=None,
    )
    every = task.config.trainer.check_val_every_n_epoch
    expected = Expectations(None, None, 0, {}, lambda number: None, every)
    confirming = replay_events(settings, expected, scheduler=Fifo(), command=recipe.format_command, label=label)
    if not folder.is_dir():
        return confirming
    found = confirming.findings
    found += _audit_space_copy(sweep.path)
    if problem:
        found.append(Wrong(f"{label}sweep.yaml: {problem}"))
    if not kept.is_file():
        found.append(Lost(f"{label}sweep.yaml is missing"))
    elif record:
        origin = {
            key: value for key, value in record.items() if key not in ("confirms", "epochs", "format", PROCESS_MB)
        }
        for name, theirs, ours in find_differences(origin, dict(task.origin or {})):
            found.append(Wrong(f"{label}sweep.yaml has {name}={theirs}, but sweep.yaml has {ours}"))
        confirms = str(record.get("confirms"))
        if Path(confirms).name != sweep.name and confirms != str(folder.parent):
            found.append(Wrong(f"{label}sweep.yaml has confirms={confirms}, which is another sweep"))
    found += audit_trial_files(confirming, settings, label, in_tab=False)
    return confirming


def _read_description(file: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a sweep.yaml, and why it cannot be read."""
    try:
        return read_yaml(file), ""
    except UserError as error:
        return {}, str(error)


def _audit_space_copy(folder: Path) -> Iterator[AuditFinding]:
    for file in (folder / "search_space").glob("*"):
        name = f"{CONFIRM_FOLDER}/search_space/{file.name}"
        if not (folder / name).is_file():
            yield Lost(f"{name} is missing")
        elif (folder / name).read_bytes() != file.read_bytes():
            yield Wrong(f"{name} differs from search_space/{file.name}")


def _audit_winner_files(
    audited: AuditedSweep, confirming: ReplayResult, table: TrialTable | None, *, is_over: bool
) -> Iterator[AuditFinding]:
    """Audit confirm.yaml, best.yaml and front/ with the table at the sweep's end (None: it has not ended)."""
    task, folder = audited.task, audited.settings.path
    if table is None:
        for name in (_RUNS, _BEST):
            if (folder / name).is_file():
                yield Wrong(f"{name} exists, but according to {EVENTS_FILE} the sweep has not ended")
        return
    try:
        confirmed = read_yaml(folder / _CONFIRMED) or None
    except UserError as error:
        yield Wrong(f"{_CONFIRMED}: {error}")
        return
    yield from _audit_confirm_runs(task, table, confirming)
    if confirmed is None and confirming.is_finished and (read_yaml(folder / _BEST).get("seeds") if is_over else None):
        yield Lost(f"{_CONFIRMED} is missing, although {_BEST} was made from it")
        return
    if confirmed is not None:
        try:
            yield from _audit_confirm_yaml(task, table, confirming, confirmed)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            yield Wrong(f"{_CONFIRMED} does not have the content of a confirmation ({type(error).__name__}: {error})")
            return
    yield from _audit_best_files(audited, table, confirmed, is_over=is_over)


def _audit_confirm_runs(task: SweepTask, table: TrialTable, confirming: ReplayResult) -> Iterator[AuditFinding]:
    """Check that the confirmation's runs have configurations of the table and fresh seeds, without repeats."""
    configurations = [{}, *(drop_seed(row.params) for row in table.rows.values())]
    fresh = set(choose_fresh_seeds(len(confirming.suggested_params) or 1, table, task.defaults))
    seen: list[dict[str, Any]] = []
    for number, params in confirming.suggested_params.items():
        if not any(is_same_value(drop_seed(params), each) for each in configurations):
            yield Wrong(f"{_RUNS}: run {number} has parameters that no trial of the sweep had")
        if params.get("seed") not in fresh:
            yield Wrong(f"{_RUNS}: run {number} has the seed {params.get('seed')}, which is not one of the new seeds")
        if any(is_same_value(params, each) for each in seen):
            yield Repeated(f"{_RUNS}: run {number} repeats the parameters of an earlier run")
        seen.append(params)


def _audit_confirm_yaml(
    task: SweepTask, table: TrialTable, confirming: ReplayResult, confirmed: Mapping[str, Any]
) -> Iterator[AuditFinding]:
    name = f"{_CONFIRMED}"
    if not confirming.is_finished:
        yield Wrong(f"{name} exists, but according to {_RUNS} the runs are not finished")
    top_k = sum(each["label"] != "default" for each in confirmed["candidates"])
    chosen = choose_candidates(table, defaults=task.defaults, top_k=top_k)
    if not chosen:
        yield Wrong(f"{name} exists, but no trial of the sweep has a value")
        return
    seeds = choose_fresh_seeds(len(confirmed["seeds"]), table, task.defaults)
    wanted = list_runs(chosen, seeds)
    asked = list(confirming.suggested_params.values())
    if confirming.num_processes == 1 and asked:
        for index, (one, other) in enumerate(itertools.zip_longest(asked, wanted)):
            if not is_same_value(one, other):
                yield Wrong(f"{_RUNS}: run {index} has {one}, but {name} and the trials of the sweep give {other}")
                break
    for params in wanted:
        if not any(is_same_value(params, each) for each in asked):
            yield Lost(f"{_RUNS} has no run with {params}")
    trained = confirming.final_tables[-1] if confirming.final_tables else confirming.history.table
    summary = yaml.safe_load(yaml.safe_dump(summarise_confirmation(chosen, seeds, trained)))
    for place, theirs, ours in find_differences(dict(confirmed), summary):
        yield Wrong(f"{name}: {place} is {theirs}, but its runs give {ours}")


# --- the winner -------------------------------------------------------------------------------------------------------


def _audit_best_files(
    audited: AuditedSweep, table: TrialTable, confirmed: Mapping[str, Any] | None, *, is_over: bool
) -> Iterator[AuditFinding]:
    """Write best.yaml and front/ into a temporary folder, and compare them with those of the sweep."""
    sweep, folder = audited.settings, audited.settings.path
    try:
        winner = select_winner(table, folder=folder, confirmed=confirmed)
    except (NoWinnerError, KeyError) as error:
        if (folder / _BEST).is_file():
            yield Wrong(f"{_BEST} exists, but {error}")
        return
    if not (folder / _BEST).is_file():
        for name in ("retrain", "front", REPORT_FILE):
            if is_over and _is_not_older(folder / name, folder / EVENTS_FILE):
                yield Lost(f"{_BEST} is missing, although {name} exists")
                break
        return
    with tempfile.TemporaryDirectory() as place:
        write_winner(
            table,
            winner,
            overrides=lambda row: add_param_overrides(audited.recipe.overrides, row.params),
            sweep=replace(sweep, folder=place),
            origin=audited.task.origin or {},
            confirmed=confirmed,
        )
        wanted = sorted(each.relative_to(place).as_posix() for each in Path(place).rglob("*.yaml"))
        there = sorted(each.relative_to(folder).as_posix() for each in (folder / "front").glob("*.yaml"))
        for name in sorted({*wanted, *there}):
            if name not in wanted:
                yield Wrong(f"{name} belongs to a trial that is not on the Pareto front")
            elif not (folder / name).is_file():
                yield Lost(f"{name} is missing")
            else:
                yield from _audit_best_file(folder / name, name, read_yaml(Path(place) / name), sweep)


def _is_not_older(file: Path, than: Path) -> bool:
    return file.exists() and than.exists() and file.stat().st_mtime >= than.stat().st_mtime


def _audit_best_file(file: Path, name: str, wanted: dict[str, Any], sweep: SweepSettings) -> Iterator[AuditFinding]:
    try:
        there = read_yaml(file)
    except UserError as error:
        yield Wrong(f"{name}: {error}")
        return
    words = shlex.split(str(there.pop("command", "")))
    wanted.pop("command")
    if words[:2] != ["python", "train.py"] or len(words) != 3 or not _is_best(words[2], name, sweep):
        yield Wrong(f"{name}: command is {shlex.join(words)}, which does not train the configuration of this file")
    for content in (there, wanted):  # a resume may have changed the paths
        content["overrides"] = [
            each for each in content.get("overrides") or [] if not str(each).startswith(("paths.", "data.root="))
        ]
    for place, theirs, ours in find_differences(there, wanted):
        yield Wrong(f"{name}: {place} is {theirs}, but sweep.yaml and {EVENTS_FILE} give {ours}")


def _is_best(override: str, name: str, sweep: SweepSettings) -> bool:
    """Return whether an override names this file of the sweep, whose folder may have been moved or renamed since."""
    key, path = override.partition("=")[0], str(parse_override_value(override))
    if key != "best" or not path.endswith(f"/{name}"):
        return False
    return Path(path.removesuffix(f"/{name}")).name in (sweep.name, sweep.path.name)


# --- retraining and report --------------------------------------------------------------------------------------------


def _audit_retrainings(folder: Path, sweep: SweepSettings) -> Iterator[AuditFinding]:
    """Check the retraining with the winner's seed, those with further seeds, and what was combined from them."""
    place = folder / "retrain"
    if not place.is_dir():
        return
    yield from _audit_retraining(place, folder, sweep)
    for further in sorted(place.glob("seed_*")):
        if re.fullmatch(r"seed_\d+", further.name):
            yield from _audit_retraining(further, folder, sweep)
    yield from _audit_combined_seeds(place)


def _audit_retraining(place: Path, folder: Path, sweep: SweepSettings) -> Iterator[AuditFinding]:
    """Check that a retraining is that of best.yaml, and that its files exist and are intact."""
    name = place.relative_to(folder).as_posix()
    files = place / "overrides.json", place / "metrics.json"
    try:
        best, config = read_yaml(folder / _BEST), read_yaml(place / "config.yaml")
        overrides, metrics = (read_json(file) if file.is_file() else None for file in files)
    except UserError as error:
        yield Wrong(f"{name}/ has a damaged file ({error})")
        return
    is_begun = bool(config) or metrics is not None
    if overrides is None:
        if is_begun:
            yield Lost(f"{name}/overrides.json is missing")
    elif not best:
        yield Lost(f"{_BEST} is missing, although {name}/ exists")
    elif [each for each in overrides if each != "train_on_val=true" and not _is_further_seed(each, place)] != best.get(
        "overrides"
    ):
        yield Wrong(f"{name}/overrides.json belongs to another configuration than {_BEST}")
    if not config and (overrides is not None or metrics is not None):
        yield Lost(f"{name}/config.yaml is missing")
    elif config and best.get("configuration"):
        yield from _audit_retrain_config(config, best["configuration"], overrides or [], name)
        if config.get("best") is not None and not _is_best(f"best={config['best']}", _BEST, sweep):
            yield Wrong(f"{name}/config.yaml has best={config['best']}, which belongs to another sweep")
    for file in (place / "checkpoints").glob("*.ckpt"):
        if not _is_intact_archive(file):
            yield Wrong(f"{name}/checkpoints/{file.name} is damaged")
    if metrics is not None:
        yield from _audit_retrain_metrics(place, folder, metrics)
    elif _is_not_older(folder / REPORT_FILE, folder / _BEST) and (place / _PREDICTIONS).is_file():
        yield Lost(f"{name}/metrics.json is missing, although {REPORT_FILE} exists")


def _is_further_seed(override: str, place: Path) -> bool:
    return override.startswith("seed=") and place.name == override.replace("=", "_")


def _audit_combined_seeds(place: Path) -> Iterator[AuditFinding]:
    """Check that the combined metrics are those of the retrainings, and that the combined predictions are intact."""
    combined, name = place / COMBINED_FOLDER, f"retrain/{COMBINED_FOLDER}"
    if not (combined / "metrics.json").is_file():
        if _is_not_older(place.parent / REPORT_FILE, combined / _PREDICTIONS):
            yield Lost(f"{name}/metrics.json is missing")
        return
    try:
        content = read_json(combined / "metrics.json")
        places = [place, *(place / f"seed_{seed}" for seed in [*content["seeds"]][1:])]
        there = [read_json(each / "metrics.json")["metrics"] for each in places]
        for key, value in summarise_metrics(there).items():
            if not is_same_value(content[key], value):
                yield Wrong(f"{name}/metrics.json: {key} is {content[key]}, but the retrainings give {value}")
        if not is_same_value(list(content["seeds"].values()), there):
            yield Wrong(f"{name}/metrics.json has other metrics than the retrainings")
        if is_measured_in_image_only(there[0]):
            return
    except (UserError, OSError, KeyError, TypeError) as error:
        yield Wrong(f"{name}/metrics.json cannot be compared with the retrainings ({error!r})")
    yield from _audit_predictions(combined, name)


def _is_intact_archive(file: Path) -> bool:
    """Return whether a ZIP archive, such as a checkpoint, is complete and matches its checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _is_intact_gzip(file: Path) -> bool:
    try:
        with gzip.open(file) as stream:
            while stream.read(2**20):
                pass
    except (OSError, EOFError, zlib.error):
        return False
    return True


_DEVICE_KEYS = ("trainer.devices", "trainer.num_nodes", "data.batch_size", "train_on_val", "test")
"""Keys that may differ in a retraining on several devices or with the validation split."""


def _audit_retrain_config(
    config: Mapping[str, Any], best: Mapping[str, Any], overrides: Sequence[str], name: str
) -> Iterator[AuditFinding]:
    made = select_configuration(DictConfig(dict(config)))
    for key in {**made, **best}:
        theirs, ours = made.get(key, ABSENT_VALUE), best.get(key, ABSENT_VALUE)
        if is_same_value(theirs, ours):
            continue
        if key == "seed" and f"seed={theirs}" in overrides:
            continue
        if key not in _DEVICE_KEYS or (key == "data.batch_size" and theirs * _num_devices(config) != ours):
            yield Wrong(f"{name}/config.yaml has {key}={theirs}, but {_BEST} has {ours}")
    is_on_val = "train_on_val=true" in overrides
    if config.get("train_on_val") not in (is_on_val, None):
        yield Wrong(
            f"{name}/config.yaml has train_on_val={config.get('train_on_val')}, but overrides.json gives {is_on_val}"
        )


def _num_devices(config: Mapping[str, Any]) -> int:
    """Return the number of devices of all nodes together, which share the batch of the trials."""
    trainer = config["trainer"]
    devices = trainer.get("devices")
    return (devices if isinstance(devices, int) else 1) * int(trainer.get("num_nodes") or 1)


def _audit_retrain_metrics(place: Path, folder: Path, metrics: Any) -> Iterator[AuditFinding]:
    name = place.relative_to(folder).as_posix()
    if not isinstance(metrics, dict) or not isinstance(metrics.get("metrics"), dict):
        yield Wrong(f"{name}/metrics.json has no metrics")
        return
    checkpoint = place / "checkpoints" / Path(str(metrics.get("checkpoint"))).name
    if not checkpoint.is_file():
        yield Lost(f"{name}/metrics.json names the checkpoint {checkpoint.name}, which is missing")
    if not is_measured_in_image_only(metrics["metrics"]):
        yield from _audit_predictions(place, name)
    if not (folder / REPORT_FILE).is_file():
        yield Lost(f"{REPORT_FILE} is missing, although {name}/metrics.json exists")
    if name == "retrain":
        yield from _audit_report_metrics(folder, metrics["metrics"], checkpoint)


def _audit_predictions(place: Path, name: str) -> Iterator[AuditFinding]:
    if not (place / _PREDICTIONS).is_file():
        yield Lost(f"{name}/{_PREDICTIONS} is missing, although {name}/metrics.json exists")
    elif not _is_intact_gzip(place / _PREDICTIONS):
        yield Wrong(f"{name}/{_PREDICTIONS} is damaged")
    if (place / _ARCHIVE).is_file() and not _is_intact_archive(place / _ARCHIVE):
        yield Wrong(f"{name}/{_ARCHIVE} is damaged")


def _audit_report_metrics(folder: Path, metrics: Mapping[str, Any], checkpoint: Path) -> Iterator[AuditFinding]:
    """Check that a report written after this retraining shows the retraining's metrics and no others."""
    report, name = folder / REPORT_FILE, "retrain/metrics.json"
    if not report.is_file() or not checkpoint.is_file() or not _is_not_older(report, checkpoint):
        return
    page = report.read_text(encoding="utf-8", errors="replace")
    section = re.search(r'<h2 id="retrained">.*?(?=<h2 |</body>)', page, re.DOTALL)
    if section is None:  # the process was killed before it updated the report
        return
    shown = [cell for cell in re.findall(r'<td class="number">([^<]*)</td>', section[0]) if cell]
    for metric, value in metrics.items():
        text = f"{math.nan if value is None else value:.4g}"
        if text in shown:
            shown.remove(text)
        else:
            yield Wrong(f"{name} has {metric} = {value}, which {REPORT_FILE} does not show")
    for text in shown:
        yield Lost(f"{name} has no metric with the value {text}, which {REPORT_FILE} shows")


def _audit_report(folder: Path, task: SweepTask) -> Iterator[AuditFinding]:
    """Check that report.html and next_space.yaml are current, unless a file they are made from is newer."""
    retrained = ["retrain/metrics.json", f"retrain/{COMBINED_FOLDER}/metrics.json"]
    files = [EVENTS_FILE, _BEST, _CONFIRMED, "sweep.yaml", *retrained]
    made_of = [folder / name for name in files]
    newest = max((each.stat().st_mtime for each in made_of if each.is_file()), default=0.0)
    report, space = (
        each.is_file() and each.stat().st_mtime >= newest for each in (folder / REPORT_FILE, folder / NEXT_SPACE_FILE)
    )
    if not (report or space):
        return
    try:
        page, wanted = render_report(folder, scientific=task.config.report.scientific)
    except (UserError, KeyError, ValueError, TypeError, OSError) as error:
        yield Wrong(f"{REPORT_FILE} and {NEXT_SPACE_FILE} cannot be made again from the files of the sweep ({error})")
        return
    if report and (task.origin or {}).get("git", {}).get("revision") == read_git_state()["revision"]:
        yield from _compare_pages((folder / REPORT_FILE).read_text(encoding="utf-8", errors="replace"), page)
    yield from _audit_next_space(folder / NEXT_SPACE_FILE, wanted, is_current=space)


def _compare_pages(there: str, wanted: str) -> Iterator[AuditFinding]:
    """Compare a report with the one that the sweep's files give now; yield only the first difference.

    Both must come from the same revision of the project: others may say the same in other words.
    """
    title = "the head"
    for number, (one, other) in enumerate(itertools.zip_longest(there.splitlines(), wanted.splitlines()), start=1):
        if other is not None and (section := re.match(r"<h2[^>]*>([^<]*)</h2>", other)):
            title = f"'{html.unescape(section[1])}'"
        elif other is not None and other.startswith("<script"):
            title = "the stories of the trials" if 'id="stories"' in other else "the charts"
        if one != other:
            yield Wrong(
                f"{REPORT_FILE}: line {number}, in {title}, differs from a report made now from the files of the sweep"
            )
            return


def _audit_next_space(file: Path, wanted: str | None, *, is_current: bool) -> Iterator[AuditFinding]:
    if is_current and wanted is None:
        yield Wrong(f"{NEXT_SPACE_FILE} exists, but the report advises no next search space")
    elif is_current and wanted is not None:
        theirs, ours = file.read_text(encoding="utf-8").splitlines(), wanted.splitlines()
        for number, (one, other) in enumerate(itertools.zip_longest(theirs, ours, fillvalue=""), start=1):
            if one != other:
                yield Wrong(f"{NEXT_SPACE_FILE}: line {number} is {one!r}, but the report advises {other!r}")
    elif not file.is_file() and wanted is not None:
        yield Lost(f"{NEXT_SPACE_FILE} is missing, although {REPORT_FILE} exists")
