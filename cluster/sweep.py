"""Run tune.py inside a job: start the sweep, or resume it if an earlier job has started it.

    python cluster/sweep.py -- sweep.name=hands sweep.num_trials=100

It uses the Ray cluster at RAY_ADDRESS or on this machine, which must already run. The arguments of tune.py can also be
a JSON list in the environment variable SWEEP_ARGUMENTS, which avoids the quoting rules of shells. The exit status is
that of tune.py: 75 means that the sweep was interrupted and can be resumed. With the option --end-on-user-error it is 0
instead of 2 after a mistake of the user. That is for KubeRay, which starts every job again that ends with another
status, each time with a new cluster.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from handpose.config import compose, override_key, parse_override_value, quote_override  # noqa: E402
from handpose.dotenv_file import load_dotenv_file  # noqa: E402
from handpose.errors import UserError  # noqa: E402
from handpose.files import expand_home  # noqa: E402
from handpose.program import exit_on_user_error  # noqa: E402
from handpose.utf8 import use_utf8  # noqa: E402

ARGUMENTS_VARIABLE = "SWEEP_ARGUMENTS"
NO_RETRY_OPTION = "--end-on-user-error"
_USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 75
"""Exit status of tune.py for a sweep that can be resumed."""


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line at its first `--` into the options before it and the arguments of tune.py after it."""
    separator = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:separator]), list(argv[separator + 1 :])


def find_sweep_folder(arguments: Sequence[str]) -> Path:
    """Return the folder of the sweep that these arguments of tune.py start or resume.

    Raises:
        UserError: the arguments have a mistake or do not name the sweep.
    """
    resumed = [parse_override_value(item) for item in arguments if override_key(item) == "sweep.resume"]
    if resumed:
        return expand_home(str(resumed[-1])).resolve()
    if not any(override_key(item) == "sweep.name" for item in arguments):
        raise UserError("sweep.name is missing; the next job needs it to find the sweep")
    return Path(compose("tune", list(arguments)).sweep.folder)


def make_tune_command(arguments: Sequence[str], folder: Path) -> list[str]:
    """Build the command line that starts the sweep, or resumes it if its folder or its store already has it."""
    tune_arguments = list(arguments)
    if not any(override_key(item) == "sweep.resume" for item in tune_arguments):
        if (folder / "sweep.yaml").is_file():
            tune_arguments = [quote_override("sweep.resume", str(folder))]
        elif (url := _find_stored_sweep(tune_arguments)) is not None:
            path_overrides = [item for item in tune_arguments if override_key(item).startswith("paths.")]
            tune_arguments = [quote_override("sweep.resume", url), *path_overrides]
    return [sys.executable, str(REPOSITORY / "tune.py"), *tune_arguments, "ray.address=auto"]


def _find_stored_sweep(arguments: Sequence[str]) -> str | None:
    """Return the URL of the sweep in its store; None if it is not there.

    The store is needed if the machine that started the sweep is lost together with its folder.
    """
    sweep = compose("tune", list(arguments)).sweep
    if sweep.storage is None:
        return None
    # Imported here: its threads would receive the signals that a job blocks after its imports.
    from handpose.sweep.storage.object_store import ObjectStore
    from handpose.urls import join_url

    url = join_url(sweep.storage, sweep.name)
    with contextlib.suppress(OSError, UserError):  # tune.py will report it
        return url if "sweep.yaml" in ObjectStore(url).list_files() else None
    return None


def measure_progress(folder: Path) -> int:
    """Return a number that grows with each epoch that the sweep, the confirmation or the retraining has trained."""
    logs = [folder / "events.jsonl", folder / "confirm" / "events.jsonl"]
    content = b"".join(file.read_bytes() for file in logs if file.is_file())
    # `reported` before format 4.
    reports = content.count(b'"event": "epoch_reported"') + content.count(b'"event": "reported"')
    last = folder / "retrain" / "checkpoints" / "last.ckpt"
    return reports + (last.stat().st_mtime_ns if last.is_file() else 0)


def run_without_retry(command: Sequence[str]) -> int:
    """Run a command, and return its exit status; 0 if it ended because of a mistake of the user.

    SIGINT and SIGTERM are passed on to it.
    """
    process = subprocess.Popen(command)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda received, frame: process.send_signal(received)) for number in signals]
    try:
        status = process.wait()
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    if status == _USER_ERROR_STATUS:
        print(
            "The job is not started again, because it would end with the same error. Correct it and submit the sweep "
            "again.",
            file=sys.stderr,
            flush=True,
        )
        return 0
    return status if status >= 0 else 128 - status


def main() -> None:
    """Replace this process by tune.py, or print the help."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return
    if NO_RETRY_OPTION in sys.argv:
        others = [item for item in sys.argv[1:] if item != NO_RETRY_OPTION]
        sys.exit(run_without_retry([sys.executable, __file__, *others]))
    if ARGUMENTS_VARIABLE in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        # Set by Ray for its own process that starts a submitted job; the retraining would have one thread.
        del os.environ["OMP_NUM_THREADS"]
    with exit_on_user_error():
        load_dotenv_file()
        given = [item for item in sys.argv[1:] if item != "--"]
        arguments = given or json.loads(os.environ.get(ARGUMENTS_VARIABLE, "[]"))
        command = make_tune_command(arguments, find_sweep_folder(arguments))
    os.execv(command[0], command)


if __name__ == "__main__":
    use_utf8()
    main()
