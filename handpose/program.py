"""Run a program: read its command line and its .env file, and turn errors and signals into messages and an exit status.

`run_script` is for the scripts that Hydra configures. Other programs use `make_parser` and `exit_on_user_error`.
"""

import argparse
import itertools
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NoReturn, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from handpose.config import (
    ConfigName,
    compose,
    insert_best_overrides,
    override_key,
    quote_non_ascii,
    search_path_override,
    use_given_extensions,
)
from handpose.config_files import config_folders
from handpose.dotenv_file import load_dotenv_file
from handpose.errors import UserError, explain_file_error, is_about_files, join_lines
from handpose.formats import rename_key
from handpose.garbage import collect_as_usual
from handpose.utf8 import use_utf8

_REPEAT_S = 10.0
"""Seconds after a SIGTERM in which another one is the same request.

scancel sends SIGTERM to every process of a Slurm job, and the job's script passes it on to the sweep.
"""

_last_sigterm_s = -math.inf


def run_script(config_name: ConfigName, main: Callable[[DictConfig], None]) -> None:
    """Run the main function of a script with the configuration of the command line.

    A mistake of the user prints one sentence to stderr and exits with status 2. Ctrl-C exits with status 130. A .env
    file in the working folder or above it is loaded first. Variables that are already set keep their values.

    Args:
        config_name: the program.
        main: the main function.
    """
    use_utf8()
    with exit_on_user_error():
        load_dotenv_file()
        flags, overrides = _split_command_line()
        overrides = [quote_non_ascii(_rename_with_warning(item)) for item in overrides]
        use_given_extensions(overrides)
        if not {"-h", "--help", "--hydra-help", "--version"} & set(flags):
            for run in expand_multirun(overrides) if {"-m", "--multirun"} & set(flags) else [overrides]:
                compose(config_name, run)  # before Hydra does, because its messages have many lines
        if {"-c", "--cfg", "-i", "--info"} & {flag.partition("=")[0] for flag in flags}:
            overrides = insert_best_overrides(overrides)  # Hydra prints the configuration and does not call main
        # Hydra does not accept a flag between two overrides.
        sys.argv[1:] = [*flags, *overrides, *search_path_override()]

    @hydra.main(config_path=str(config_folders()[0]), config_name=config_name, version_base="1.3")
    def entry(_: DictConfig) -> None:
        with exit_on_user_error():
            main(compose(config_name, _list_given_overrides()))

    entry()


def _split_command_line() -> tuple[list[str], list[str]]:
    """Split the command line into Hydra's flags with their values, such as `--cfg job`, and the overrides."""
    arguments = sys.argv[1:]
    if not any(item.startswith("-") for item in arguments):
        return [], arguments
    overrides = [item for item in arguments if "=" in item and not item.startswith("-")]
    return [item for item in arguments if item not in overrides], overrides


def _rename_with_warning(override: str) -> str:
    """Replace a key's former name by its current name, with a warning."""
    renamed = rename_key(override)
    if renamed != override:
        old, new = override_key(override), override_key(renamed)
        print(f"warning: {old} has been renamed to {new}; use the new name", file=sys.stderr)
    return renamed


def expand_multirun(overrides: Sequence[str]) -> list[list[str]]:
    """List the overrides of every run of a multirun. Each run has one of the values of, for example, `seed=0,1`."""
    return [list(run) for run in itertools.product(*(_expand_override(item) for item in overrides))]


def _expand_override(override: str) -> list[str]:
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return [override]  # composing it will report the mistake
    if not parsed.is_discrete_sweep():
        return [override]
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


def list_task_overrides() -> list[str]:
    """List the overrides of the running script, with those of the file in best=FILE instead of best=FILE."""
    overrides = insert_best_overrides(_list_given_overrides())
    return [item for item in overrides if override_key(item) != "best"]


def list_given_keys() -> list[str]:
    """List the keys that the running script's command line sets by name, without those of best=FILE."""
    return [override_key(item) for item in _list_given_overrides() if not item.startswith("~")]


def _list_given_overrides() -> list[str]:
    """List the running script's overrides with environment variables resolved, since other machines may not have them.

    The overrides of the searcher stay unresolved: overrides are saved, and the URL of the database may contain a
    password.
    """
    resolved = HydraConfig.get().overrides.task
    written = cast(list[str], OmegaConf.to_container(resolved, resolve=False))
    return [item if override_key(item).startswith("searcher.") else resolved[i] for i, item in enumerate(written)]


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Make an argument parser for `python -m module`. Its help shows the description unchanged."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Convert UserError, errors about the user's files, Ctrl-C and SIGTERM to a one-line message and an exit status."""
    collect_as_usual()
    hook = threading.excepthook
    threading.excepthook = partial(_handle_thread_error, hook)
    try:
        with interrupt_on_sigterm():
            yield
            sys.stdout.flush()
    except UserError as error:
        _exit(f"error: {join_lines(error)}", 2)
    except BrokenPipeError:
        _exit_without_reader()
        raise
    except OSError as error:
        if not is_about_files(error):
            raise
        _exit(f"error: {join_lines(explain_file_error(error))}", 2)
    except KeyboardInterrupt as error:
        _exit(str(error) or "interrupted", 130)
    finally:
        threading.excepthook = hook


def _exit_without_reader() -> None:
    """Exit if nobody reads the output any more, as after `| head`; with the status that a shell gives to SIGPIPE."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    if any(state & select.POLLERR for _, state in output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        raise SystemExit(128 + signal.SIGPIPE) from None


def _handle_thread_error(hook: Callable[[threading.ExceptHookArgs], Any], arguments: threading.ExceptHookArgs) -> None:
    """Print no traceback for an error that the thread passes on to the main thread, as TensorBoard's writer does."""
    if getattr(arguments.thread, "exception", None) is not arguments.exc_value:
        hook(arguments)


def _exit(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C within the block, unless SIGTERM has a handler already.

    Lightning's handler would continue to the end of the batch, which may never come.
    """
    is_free = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    forget_sigterm()
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_keyboard_interrupt(number: int, frame: FrameType | None) -> None:
    if not is_repeated_sigterm(number):  # a repeat would interrupt what the first one has started, such as saving
        raise KeyboardInterrupt


def raises_on_sigterm() -> bool:
    """Whether SIGTERM is treated like Ctrl-C at the moment; see `interrupt_on_sigterm`."""
    return signal.getsignal(signal.SIGTERM) is _raise_keyboard_interrupt


def is_repeated_sigterm(number: int) -> bool:
    """Whether a signal is a SIGTERM that repeats one of the last seconds. For signal handlers, once for each signal."""
    global _last_sigterm_s
    if number != signal.SIGTERM:
        return False
    now = time.monotonic()
    if now - _last_sigterm_s < _REPEAT_S:
        return True
    _last_sigterm_s = now
    return False


def forget_sigterm() -> None:
    """Let the next SIGTERM be a new request."""
    global _last_sigterm_s
    _last_sigterm_s = -math.inf
