"""tune.py as a job runs it: it begins the sweep, or goes on with the one that an earlier job has begun.

    python cluster/sweep.py -- sweep.name=hands sweep.num_trials=100

On a Ray that runs already, at RAY_ADDRESS or on this machine. The arguments may stand in SWEEP_ARGUMENTS instead, a
list in JSON, where a command line would have to pass shells. Its exit status is that of tune.py: 75 is a sweep that
was interrupted and can go on.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from handpose.config import (  # noqa: E402
    compose,
    exit_on_user_error,
    load_dotenv_file,
    override_key,
    parse_override_value,
    quote_override,
)
from handpose.errors import UserError  # noqa: E402
from handpose.files import expand_home  # noqa: E402
from handpose.utf8 import use_utf8  # noqa: E402

ARGUMENTS_VARIABLE = "SWEEP_ARGUMENTS"
INTERRUPTED_STATUS = 75
"""Exit status of tune.py for a sweep that can go on."""


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line at its first `--` into the options before it and the arguments of tune.py after it."""
    place = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:place]), list(argv[place + 1 :])


def find_sweep_folder(arguments: Sequence[str]) -> Path:
    """The folder of the sweep that these arguments of tune.py are about. Raises UserError for a mistake in them."""
    resumed = [parse_override_value(item) for item in arguments if override_key(item) == "sweep.resume"]
    if resumed:
        return expand_home(str(resumed[-1])).resolve()
    if not any(override_key(item) == "sweep.name" for item in arguments):
        raise UserError("sweep.name is missing; the next job needs it to find the sweep")
    return Path(compose("tune", list(arguments)).sweep.folder)


def make_tune_command(arguments: Sequence[str], folder: Path) -> list[str]:
    """The command line that begins the sweep, or goes on with it where its folder, or its store, has it already."""
    asked = list(arguments)
    if not any(override_key(item) == "sweep.resume" for item in asked):
        if (folder / "sweep.yaml").is_file():
            asked = [quote_override("sweep.resume", str(folder))]
        elif (url := _find_stored_sweep(asked)) is not None:
            here = [item for item in asked if override_key(item).startswith("paths.")]
            asked = [quote_override("sweep.resume", url), *here]
    return [sys.executable, str(REPOSITORY / "tune.py"), *asked, "ray.address=auto"]


def _find_stored_sweep(arguments: Sequence[str]) -> str | None:
    """The URL of the sweep in its store, where the machine that began it is gone, and its folder with it."""
    sweep = compose("tune", list(arguments)).sweep
    if sweep.storage is None:
        return None
    # Here, since its threads would get the signals that a job blocks after its imports.
    from handpose.sweep.storage.object_store import ObjectStore
    from handpose.urls import join_url

    url = join_url(sweep.storage, sweep.name)
    with contextlib.suppress(OSError, UserError):  # which tune.py tells of
        return url if "sweep.yaml" in ObjectStore(url).list_files() else None
    return None


def measure_progress(folder: Path) -> int:
    """A number that grows with the epochs that sweep, confirmation and retraining have trained."""
    logs = [folder / "events.jsonl", folder / "confirm" / "events.jsonl"]
    content = b"".join(file.read_bytes() for file in logs if file.is_file())
    reports = content.count(b'"event": "epoch_reported"') + content.count(b'"event": "reported"')  # before format 4
    last = folder / "retrain" / "checkpoints" / "last.ckpt"
    return reports + (last.stat().st_mtime_ns if last.is_file() else 0)


def main() -> None:
    """Become tune.py."""
    with exit_on_user_error():
        load_dotenv_file()
        given = [item for item in sys.argv[1:] if item != "--"]
        arguments = given or json.loads(os.environ.get(ARGUMENTS_VARIABLE, "[]"))
        command = make_tune_command(arguments, find_sweep_folder(arguments))
    os.execv(command[0], command)


if __name__ == "__main__":
    use_utf8()
    main()
