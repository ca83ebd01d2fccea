"""The summary of a finished sweep for the terminal."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handpose.config import quote_override
from handpose.metrics.official import format_official_pa_mpjpe
from handpose.metrics.validation import is_measured_in_image_only
from handpose.plain_values import is_equal
from handpose.report.formatting import format_interval, format_metric, format_metric_value, format_value
from handpose.report.sweep_record import CombinedSeeds
from handpose.report.trial_table import TrialRow, TrialTable


def format_summary(
    *,
    table: TrialTable,
    winner: TrialRow,
    defaults: Mapping[str, Any],
    confirmed: Mapping[str, Any] | None = None,
    retrained: Mapping[str, float] | None,
    combined: CombinedSeeds | None = None,
    train_on_val: bool = False,
    folder: Path,
) -> str:
    """Format the results of a sweep.

    Args:
        table: the trials.
        winner: the row of the winner.
        defaults: configuration key -> default value, for the searched keys.
        confirmed: the content of confirm.yaml; None if there was no confirmation.
        retrained: metrics of the retrained winner, including those under `test/` and `baseline/` if they were measured;
            None if it was not retrained.
        combined: the results of all seeds of the retraining; None if there is only one.
        train_on_val: whether the winner was retrained on the validation split too.
        folder: folder of the sweep.
    """
    lines = [f"winner      trial {winner.number}: {_format_validation(table, winner)}"]
    lines += _format_confirmation(confirmed, len(table.rows))
    lines.append(_format_changes(winner, defaults))
    if retrained:
        means = retrained if combined is None else {**retrained, **combined.mean}
        lines.append(_format_retrained(means, metric=table.metric, train_on_val=train_on_val))
        lines += [] if combined is None else _format_seeds(combined)
    lines.append(f"files       {folder}: best.yaml, trials.csv, sweep.yaml, study/, tensorboard/")
    if confirmed is not None:
        lines.append(f"            {folder / 'confirm'}: confirm.yaml, trials.csv, tensorboard/")
    if table.checkpoint_bytes:
        held, budget = table.checkpoint_bytes / 1e9, table.checkpoint_budget_bytes / 1e9
        use = (
            "trials that have not ended continue from them" if table.end == "spent" else "needed to continue the sweep"
        )
        lines.append(f"            checkpoints/ of trials, {held:.2f} of {budget:g} GB; {use}")
    if retrained is not None:
        predictions = "" if is_measured_in_image_only(retrained) else "test_preds.json.gz, pred.zip, "
        lines.append(f"            {folder / 'retrain'}: checkpoints/, {predictions}metrics.json")
    if combined is not None:
        others = ", ".join(f"seed_{seed}/" for seed in combined.seeds[1:])
        lines.append(f"            and the same in {others} and, of {combined.describe_predictions()}, combined/")
    lines.append(f"view        tensorboard --logdir {shlex.quote(str(folder))}")
    lines.append("train again " + shlex.join(["python", "train.py", quote_override("best", str(folder / "best.yaml"))]))
    return "\n".join(lines)


def _format_validation(table: TrialTable, winner: TrialRow) -> str:
    return f"validation {format_metric(table.metric, table.get_value(winner))} after {winner.epochs} epochs"


def _format_confirmation(confirmed: Mapping[str, Any] | None, num_trials: int) -> list[str]:
    """Format the result of the confirmation, or that there was none."""
    optimistic = f"the best of {num_trials} noisy values is too good on average"
    if confirmed is None:
        return [f"            not confirmed (sweep.confirm): {optimistic}"]
    outs = [
        f"            {each['label']} is excluded: {each['out']}" for each in confirmed["candidates"] if each["out"]
    ]
    if confirmed["winner"] is None:
        return [f"confirmed   nothing: no finalist completed all its runs; {optimistic}", *outs]
    winner, metric = confirmed["candidates"][confirmed["winner"]], confirmed["metric"]
    seeds = ", ".join(map(str, confirmed["seeds"]))
    mean = f"{format_metric(metric, winner['mean'])}{format_interval(metric, winner['low'], winner['high'])}"
    lines = [f"confirmed   mean {mean} after {confirmed['epochs']} epochs, seeds {seeds}"]
    return lines + _format_other_candidates(confirmed) + outs


def _format_other_candidates(confirmed: Mapping[str, Any]) -> list[str]:
    """Format how the winner compares with the other candidates."""
    lines = []
    if (alike := confirmed["not_distinguishable_from"]) is None:
        reason = confirmed["unknown"]["not_distinguishable_from"]
        lines.append(f"            unknown whether it is better than the others: {reason}")
    elif alike:
        means = {each["label"]: each["mean"] for each in confirmed["candidates"]}
        named = ", ".join(f"{label} ({format_metric_value(confirmed['metric'], means[label])})" for label in alike)
        lines.append(f"            not distinguishable from {named}: the runs do not show which is better")
    if confirmed["optimism"]:
        too_good = format_metric(confirmed["metric"], confirmed["optimism"])
        lines.append(f"            the best of several means is too good on average, here by about {too_good}")
    if (gain := confirmed["gain_over_default"]) is not None:
        interval = format_interval(confirmed["metric"], gain["low"], gain["high"])
        lines.append(f"gain        {format_metric(confirmed['metric'], gain['mean'])}{interval} over the default")
    else:
        lines.append(f"gain        unknown: {confirmed['unknown']['gain_over_default']}")
    return lines


def _format_seeds(combined: CombinedSeeds) -> list[str]:
    """Format between which seeds the metrics are means, and what the predictions reach that were written."""
    name = "test/pa_mpjpe_mm"
    if name not in combined.mean:
        return []
    seeds = ", ".join(map(str, combined.seeds))
    deviation = format_metric_value(name, combined.deviation[name])
    reached = format_metric(name, combined.metrics[name])
    return [
        f"            means of the seeds {seeds}, with a standard deviation of {deviation} mm; "
        f"{combined.describe_predictions()}: {reached}"
    ]


def _format_changes(winner: TrialRow, defaults: Mapping[str, Any]) -> str:
    changed = {
        key: value for key, value in winner.params.items() if key not in defaults or not is_equal(defaults[key], value)
    }
    if not changed:
        return "changed     nothing: the default configuration won"
    texts = [f"{key} {_format_default(key, defaults)}{format_value(value)}" for key, value in changed.items()]
    return "changed     " + ", ".join(texts)


def _format_default(key: str, defaults: Mapping[str, Any]) -> str:
    return f"{format_value(defaults[key])} -> " if key in defaults else ""


def _format_retrained(metrics: Mapping[str, float], *, metric: str, train_on_val: bool) -> str:
    """Format the sweep's metric and PA-MPJPE of the retrained winner, with the PA-MPJPE of the mean pose.

    The values are those on the test split. If that has no joints, they are those on the validation split, which was
    used to select the configuration and the checkpoint.
    """
    on_both = " on the training and validation splits, last checkpoint" if train_on_val else ""
    stage = "test" if "test/pa_mpjpe_mm" in metrics else "val"
    if "test/keypoint_error_px" in metrics and stage == "val":
        return f"retrained  {on_both}: test {metrics['test/keypoint_error_px']:.2f} px (2-D keypoints only)"
    if f"{stage}/pa_mpjpe_mm" not in metrics:
        return f"retrained  {on_both}: no errors, because the test split has no joints"
    value, mean_pose = metrics[f"{stage}/pa_mpjpe_mm"], metrics["baseline/pa_mpjpe_mm"]
    named = "test" if stage == "test" else "validation (the test split has no joints)"
    ratio = f"mean pose {mean_pose:.2f} mm, ratio {value / mean_pose:.2f}"
    caution = "" if stage == "test" else "; optimistic, because this split chose the winner"
    own = f"{stage}/{metric.rpartition('/')[2]}"
    first = f"{format_metric(own, metrics[own])}, " if own in metrics and own != f"{stage}/pa_mpjpe_mm" else ""
    title = f"retrained  {on_both + ':' if train_on_val else ''}"
    shown = f"{title} {named} {first}PA-MPJPE {value:.2f} mm without reflection, {ratio}{caution}"
    if (official := metrics.get("test/pa_mpjpe_official_mm")) is None:
        return shown
    is_target = "the sweep optimised PA-MPJPE without reflection"
    optimised = is_target if metric == "val/pa_mpjpe_mm" else f"the sweep optimised {metric}"
    return f"{shown}\n{'':<12}to compare with papers: {format_official_pa_mpjpe(official)}; {optimised}"
