"""Retrain the winner of a sweep with its full schedule, as train.py would; an interrupted retraining resumes.

If several GPUs share its batches, the retraining runs as a separate program on each node, and Lightning starts that
program once per device: `python -m handpose.sweep.selection.retrain FOLDER DEVICES NODES`, followed by further
overrides: `train_on_val=true` to train on the validation split as well, `seed` for a further seed, and
`budget.finish_by` if there is a budget.
"""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from handpose.config import compose, override_key, parse_override_value, quote_override
from handpose.errors import UserError
from handpose.files import archive, read_json, write_json
from handpose.program import exit_on_user_error, interrupt_on_sigterm
from handpose.report.formatting import format_duration, format_params
from handpose.sweep.driver.shutdown import INTERRUPTED_STATUS, SweepInterruptedError
from handpose.sweep.execution.retrain_nodes import RetrainNodes, make_program_environment, run_on_nodes
from handpose.sweep.execution.worker_death import describe_exit
from handpose.sweep.record.settings import format_resume_command
from handpose.sweep.record.trial_segment import CHECKPOINTS_FOLDER, make_run_name
from handpose.training.checkpoints import read_checkpoint
from handpose.training.fit import RunFolders, prepare_folders, train_and_test
from handpose.training.trainer import count_local_processes, uses_gpu
from handpose.utf8 import use_utf8
from handpose.yaml_files import load_yaml

_WINNER_FILE = "overrides.json"
"""File with the overrides of the configuration that is retrained."""
_END_TIMEOUT_S = 60.0
_LEAST_RETRAINING_S = 10.0
"""A retraining that is finished is not replaced by one that has less time than this."""


class Retraining(NamedTuple):
    """One retraining of a winner.

    Attributes:
        folder: folder of the sweep.
        seed: the seed. None: that of the winner's configuration.
    """

    folder: Path
    seed: int | None = None

    @property
    def place(self) -> Path:
        """The folder of its files."""
        place = self.folder / "retrain"
        return place if self.seed is None else place / f"seed_{self.seed}"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.place / "checkpoints"

    def list_overrides(self, *, use_val: bool) -> list[str]:
        """List the overrides of the winner's configuration that it needs."""
        seed = [] if self.seed is None else [quote_override("seed", self.seed)]
        return (["train_on_val=true"] if use_val else []) + seed


def retrain_winner(
    folder: Path,
    *,
    seed: int | None = None,
    devices: int | None = None,
    use_val: bool = False,
    epoch_s: float | None = None,
    trial_epochs: int = 0,
    repeats_shortened: bool = False,
    find_nodes: Callable[[int], AbstractContextManager[RetrainNodes | None]] | None = None,
    find_end: Callable[[int], float] | None = None,
) -> dict[str, float]:
    """Train the configuration of best.yaml as train.py would, and test it once the training is over.

    The test split is used only then. An interrupted retraining resumes from its last checkpoint; of a finished one only
    the metrics are read. The retraining of another winner is kept as `retrain_1`, `retrain_2` and so on.

    Args:
        folder: folder of the sweep.
        seed: the seed. None: that of the winner's configuration.
        devices: number of devices that share each batch. None: those of best.yaml if it names them, else all GPUs of
            this machine. The number is reduced until it divides `data.batch_size`, so that each step uses as many
            images as in the trials.
        use_val: whether to train on the validation split as well. The last checkpoint is tested then, since no split
            remains to choose the best one by.
        epoch_s: seconds that an epoch takes on one device, for the expected time that is printed. None: unknown.
        trial_epochs: epochs that the trial of the winner has trained.
        repeats_shortened: whether a retraining that a budget has shortened is done again; the earlier one is kept.
        find_nodes: called with the batch size. Its context holds nodes of the cluster that retrain instead of this
            machine, or None.
        find_end: called with the number of GPUs. Returns when the retraining has to be finished, in seconds since the
            epoch; infinity if there is no limit. None: it trains all its epochs.

    Returns the metrics of the training and of the test.

    Raises:
        UserError: the retraining failed.
        SweepInterruptedError: it was interrupted.
    """
    place = (run := Retraining(folder, seed)).place
    winner = _read_winner(run, use_val=use_val)
    if _is_of_another_winner(place, winner):
        _check_time_left(place, find_end)
        archive(place)
    if _is_finished(place) and not repeats_shortened:
        return _read_metrics(place)
    config = compose("train", [_format_best_override(folder)])
    if _is_finished(place):
        if _count_trained_epochs(run.checkpoints) >= config.trainer.max_epochs:
            return _read_metrics(place)
        archive(place)
    announce = partial(_print_start, run, config, epoch_s=epoch_s, trial_epochs=trial_epochs, find_end=find_end)
    own = run.list_overrides(use_val=use_val)
    if find_nodes is not None and not _has_devices(winner):
        with find_nodes(config.data.batch_size) as nodes:
            if nodes is not None:
                _run_on_cluster(folder, nodes, [*own, *announce(nodes.num_devices, num_gpus=nodes.num_gpus)])
                return _read_metrics(place)
    number = _find_divisor(devices or _count_gpus(config, winner), config.data.batch_size)
    return _train_on_this_machine(run, winner, config, number, announce, own)


def _train_on_this_machine(
    run: Retraining,
    winner: list[str],
    config: DictConfig,
    number: int,
    announce: Callable[..., list[str]],
    own: list[str],
) -> dict[str, float]:
    """Train on so many devices of this machine: in this process, or in a subprocess if they share each batch."""
    num_devices = count_local_processes(config) if number == 1 else number
    changes = [*own, *announce(num_devices, num_gpus=num_devices if uses_gpu(config) else 0)]
    if number == 1:
        return _train_in_process(run, winner, devices=1, changes=changes)
    _run_in_subprocess(run.folder, number, changes)
    return _read_metrics(run.place)


def _print_start(
    run: Retraining,
    config: DictConfig,
    num_devices: int,
    *,
    num_gpus: int,
    epoch_s: float | None,
    trial_epochs: int,
    find_end: Callable[[int], float] | None,
) -> list[str]:
    """Print what is trained and for how long. Return the overrides that make it end in time, if there is a budget."""
    finish_at = math.inf if find_end is None else find_end(num_gpus)
    changes = [] if finish_at == math.inf else [quote_override("budget.finish_by", _format_time(finish_at))]
    folder, max_epochs = run.folder, config.trainer.max_epochs
    best = load_yaml(folder / "best.yaml")
    params = format_params(best.get("params") or {})
    name = f"trial {best['trial']}" if "trial" in best else "the winner"
    named = f"{name} ({params})" if params else name
    named += "" if run.seed is None else f", seed {run.seed}"
    trained = _count_trained_epochs(run.checkpoints)
    if trained >= max_epochs:
        print(f"retrain     {named}: all {max_epochs} epochs are done, the test follows", flush=True)
        return changes
    epochs = f"continues after epoch {trained} of {max_epochs}" if trained else f"{max_epochs} epochs"
    on = f"on {num_devices} device{'' if num_devices == 1 else 's'}"
    left_s = (max_epochs - trained) * (epoch_s or 0.0) / num_devices
    time_left = f", about {format_duration(left_s, is_rough=True)} at the speed of its trial" if left_s else ""
    if finish_at < math.inf:
        given_s = max(0.0, finish_at - time.time())
        time_left += f"; the budget gives it {format_duration(given_s)}, in which the learning rate falls to its end"
        checkpoint = _find_trial_checkpoint(folder, best.get("trial"))
        if not trained and checkpoint is not None and given_s < trial_epochs * (epoch_s or 0.0) / num_devices:
            changes.append(quote_override("model.weights", str(checkpoint)))
            time_left += "; because its trial had longer, it starts with the weights of the trial"
    print(f"retrain     {named}: {epochs} {on}{time_left}", flush=True)
    return changes


def _find_trial_checkpoint(folder: Path, trial: int | None) -> Path | None:
    """Return the newest checkpoint of a trial in the sweep's folder, if there is one."""
    place = folder / CHECKPOINTS_FOLDER / make_run_name(-1 if trial is None else trial)
    return max(place.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, default=None)


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat()


def _read_winner(run: Retraining, *, use_val: bool) -> list[str]:
    """Return the overrides that define the retraining; training on other images counts as a different one."""
    overrides: list[str] = load_yaml(run.folder / "best.yaml")["overrides"]
    return [*overrides, *run.list_overrides(use_val=use_val)]


def _is_finished(place: Path) -> bool:
    return (place / "metrics.json").is_file()


def _read_metrics(place: Path) -> dict[str, float]:
    metrics = read_json(place / "metrics.json")["metrics"]
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _format_best_override(folder: Path) -> str:
    return quote_override("best", str(folder / "best.yaml"))


def _has_devices(winner: list[str]) -> bool:
    return any(override_key(item) == "trainer.devices" for item in winner)


def _count_gpus(config: DictConfig, winner: list[str]) -> int:
    is_on_cpu = config.trainer.accelerator == "cpu"
    return 1 if is_on_cpu or _has_devices(winner) else max(1, torch.cuda.device_count())


def _find_divisor(most: int, batch_size: int) -> int:
    return next(number for number in range(most, 0, -1) if batch_size % number == 0)


def _train_in_process(
    run: Retraining, winner: list[str], *, devices: int, num_nodes: int = 1, changes: list[str]
) -> dict[str, float]:
    """Train in this process, which is one of several if there are several devices per node or several nodes.

    `changes` are further overrides.
    """
    place = run.place
    places = {"logs": place, "checkpoints": run.checkpoints, "predictions": place}
    overrides = [
        _format_best_override(run.folder),
        *(quote_override(f"paths.{name}", str(path)) for name, path in places.items()),
    ]
    overrides += changes
    config = compose("train", overrides)
    if devices * num_nodes > 1:
        shared = {"trainer.devices": devices, "+trainer.num_nodes": num_nodes}
        shared["data.batch_size"] = config.data.batch_size // (devices * num_nodes)
        overrides += [quote_override(key, value) for key, value in shared.items()]
    config = compose("train", [*overrides, *_make_resume_overrides(run.checkpoints, config.trainer.max_epochs)])
    folders = RunFolders(place, run.checkpoints, place) if place.exists() else prepare_folders(config)
    write_json(place / _WINNER_FILE, winner)
    try:
        with interrupt_on_sigterm():
            result = train_and_test(config, folders)
    except KeyboardInterrupt as error:
        raise _make_interrupted_error(run.folder) from error
    return (result.training.metrics if result.training else {}) | result.test_metrics


def _make_interrupted_error(folder: Path) -> SweepInterruptedError:
    return SweepInterruptedError(f"the retraining was interrupted; to resume: {format_resume_command(folder)}")


def _run_in_subprocess(folder: Path, devices: int, changes: list[str]) -> None:
    """Run the retraining as a separate program, because Lightning starts the program of this process once per device.

    The subprocess runs in its own session, so that it receives Ctrl-C only once, from here.
    """
    command = [sys.executable, "-m", __name__, str(folder), str(devices), "1", *changes]
    process = subprocess.Popen(command, env=make_program_environment(), start_new_session=True)
    try:
        with interrupt_on_sigterm():
            status = process.wait()
    except KeyboardInterrupt as error:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise _make_interrupted_error(folder) from error
    if status == INTERRUPTED_STATUS:
        raise _make_interrupted_error(folder)
    if status:
        raise UserError(
            f"the retraining on {devices} devices {describe_exit(status)}; to resume: {format_resume_command(folder)}"
        )


def _run_on_cluster(folder: Path, retrain_nodes: RetrainNodes, changes: list[str]) -> None:
    """Run the retraining on nodes of the Ray cluster, which this process has joined."""
    arguments = [
        str(folder),
        str(retrain_nodes.devices_per_node),
        str(len(retrain_nodes.node_ids)),
        *changes,
    ]
    try:
        with interrupt_on_sigterm():
            run_on_nodes(retrain_nodes, __name__, arguments, print_line=partial(print, end="", flush=True))
    except KeyboardInterrupt as error:
        raise _make_interrupted_error(folder) from error
    except UserError as error:
        on = f"{retrain_nodes.num_devices} devices of {len(retrain_nodes.node_ids)} nodes"
        raise UserError(
            f"the retraining on {on} has failed: {error}; to resume: {format_resume_command(folder)}"
        ) from error


def _is_of_another_winner(place: Path, winner: list[str]) -> bool:
    """Return whether there is a retraining of another winner: a sweep with more trials may have a new one."""
    file = place / _WINNER_FILE
    return place.exists() and (not file.is_file() or read_json(file) != winner)


def _check_time_left(place: Path, find_end: Callable[[int], float] | None) -> None:
    """Raise UserError if the budget has no time for another retraining, and a finished one would be put aside."""
    if find_end is not None and _is_finished(place) and find_end(1) - time.time() < _LEAST_RETRAINING_S:
        raise UserError(
            f"the budget has no time left to retrain another winner, or with other images; {place} keeps the "
            "retraining that there is; give a larger budget"
        )


def _make_resume_overrides(checkpoints: Path, max_epochs: int) -> list[str]:
    """Return overrides that resume from the last checkpoint, or only test the best one if all epochs are done."""
    epochs = _count_trained_epochs(checkpoints)
    if not epochs:
        return []
    begun = quote_override("model.weights", None)  # weights only initialise a new training
    if epochs < max_epochs:
        return [quote_override("model.checkpoint_path", str(checkpoints / "last.ckpt")), begun]
    # A training without a validation split has only the last checkpoint.
    best = max(
        checkpoints.glob("best-*.ckpt"), key=lambda file: file.stat().st_mtime, default=checkpoints / "last.ckpt"
    )
    return [quote_override("model.checkpoint_path", str(best)), begun, "test=true"]


def _count_trained_epochs(checkpoints: Path) -> int:
    try:
        epochs: int = read_checkpoint(checkpoints / "last.ckpt")["epoch"] + 1
    except UserError:  # there is no checkpoint yet, or it is incomplete
        return 0
    return epochs


def _end_with_parent(parent: int) -> None:
    """End this process when its parent is gone, since the parent might be started again and retrain a second time.

    The process interrupts itself first, then kills itself: it cannot react to an interrupt while it waits for processes
    of other nodes that are gone too.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(_END_TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _main() -> None:
    folder, devices, num_nodes, changes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    values = {override_key(item): parse_override_value(item) for item in changes}
    seed = values.get("seed")
    run = Retraining(folder, seed if isinstance(seed, int) else None)
    _end_with_parent(os.getppid())
    with exit_on_user_error():
        try:
            winner = _read_winner(run, use_val="train_on_val" in values)
            _train_in_process(run, winner, devices=devices, num_nodes=num_nodes, changes=changes)
        except SweepInterruptedError:
            sys.exit(INTERRUPTED_STATUS)


if __name__ == "__main__":
    use_utf8()
    _main()
