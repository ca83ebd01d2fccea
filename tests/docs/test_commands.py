"""Every command in the documentation is one that its program accepts: the keys, values and options all exist.

Commands of this project are composed or parsed, not run. Those that matter most are run in small (slow).
"""

import argparse
import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.utils import instantiate

from handpose.config import compose
from handpose.config_files import REPOSITORY
from handpose.errors import UserError
from handpose.program import expand_multirun
from handpose.search.space import load_space
from handpose.sweep.controller.scheduler_and_searcher import bind_scheduler
from handpose.sweep.driver.resume import _CHANGEABLE_KEYS
from tests.docs.pages import PAGES, Command, find_commands, find_files, read_page
from tests.programs import command_line
from tests.sweep.sweeps import write_begun_sweep
from tests.test_utf8 import ASCII

PLACEHOLDERS = {
    "best=FILE": "best=outputs/sweeps/hands/best.yaml",
    "search_space=FILE": "search_space=recipe",
    "searcher.warm_start=[DIR]": "searcher.warm_start=[outputs/sweeps/hands]",
    "sweep.resume=DIR": "sweep.resume=outputs/sweeps/hands",
    "sweep.resume=FOLDER": "sweep.resume=outputs/sweeps/hands",
    "experiment=NAME": "experiment=exp_submission",
    "ARGUMENTS": "sweep.num_trials=3",
    "HOST:PORT": "10.0.0.1:6379",
    "KEY=VALUE": "seed=1",
    "URL": "sqlite:////tmp/study.db",
    "NAME": "hands",
    "KEY": "model.decoder.depth",
}
"""What stands in a page for something of the reader's -> what it is replaced by. Other words such as DIR may stay."""

OTHER_PROGRAMS = {
    *(
        "bkill",
        "bjobs",
        "cat",
        "cd",
        "chmod",
        "docker",
        "export",
        "git",
        "grep",
        "head",
        "kubectl",
        "ls",
        "mkdir",
        "mkdocs",
    ),
    *("mkdir", "mkdocs", "optuna-dashboard", "pip", "scancel", "source", "squeue", "tail", "tensorboard", "unzip"),
}
"""Programs that are not this project's, whose options are not checked."""

_OTHER_MODULES = {"http.server", "mypy", "pip", "pytest", "ruff", "venv"}
_LAUNCHERS = {"cluster/slurm.py", "cluster/lsf.py", "cluster/kuberay.py", "cluster/ray_up.py"}


class _Parsed(BaseException):
    """Ends a program after it has read its command line."""


def _end_after(parse):
    def parse_and_end(*args, **kwargs):
        raise _Parsed(parse(*args, **kwargs))

    return parse_and_end


COMMANDS = [command for page, text in map(read_page, PAGES) for command in find_commands(text, page)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the results of earlier commands, and with the files that pages tell the reader to write."""
    place = tmp_path_factory.mktemp("reader")
    for _, text in map(read_page, PAGES):
        beside = place / "mine" if "paths.extensions=mine" in text else place
        for name, content in find_files(text).items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_text(content, encoding="utf-8")
    shutil.copy(REPOSITORY / "requirements.txt", place)
    shutil.copy(REPOSITORY / "requirements-docs.txt", place)
    return place


@pytest.fixture
def check(folder, monkeypatch):
    """Check a command in the reader's folder."""
    monkeypatch.chdir(folder)
    shutil.rmtree("outputs", ignore_errors=True)  # what was written for another command
    for name in ("DIR_SCRATCH", "MP_DATA"):
        monkeypatch.delenv(name, raising=False)

    parse = argparse.ArgumentParser.parse_args
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, _end_after(getattr(argparse.ArgumentParser, name)))
    return lambda command: check_command(command, parse)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_a_command_is_valid(command, check):
    try:
        check(command)
    except (UserError, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:  # of --help
            return
        pytest.fail(f"{command.place}: {' '.join(command.words)}: {error}")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("python tune.py sweep.num_trails=3", "no configuration key sweep.num_trails"),
        ("python tune.py search_space=absent", "absent"),
        ("python tune.py scheduler=pbt sweep.second_objective=latency_ms", "needs a scheduler for two objectives"),
        ("python tune.py sweep.resume=outputs/sweeps/x optimizer.lr=0.1", "optimizer.lr cannot change"),
        ("python train.py --no-such-flag", "2"),
        ("python train.py -m seed=0,1 optimizer.lr=-1", "optimizer.lr must be above 0"),
        ("python -m handpose.predict hands/ --no-such-flag", "2"),
        ("python -m handpose.evaluation --checkpoint a.ckpt optimizer.lrr=1", "no configuration key optimizer.lrr"),
        ("python -m handpose.absent", "handpose.absent"),
        ("python cluster/slurm.py --nodes 0 --wall-time 01:00:00 -- sweep.num_trials=3", "2"),
        ("python cluster/kuberay.py --image i --claim c --cpus-per-node 1 -- sweep.name=Hands", "2"),
        ("python benchmarks/slots.py --absent 3", "2"),
        ("python no_such_script.py", "no_such_script.py"),
        (".venv/bin/pip install -r absent.txt", "absent.txt"),
        ("ray pu hands.yaml", "pu"),
        ("no_such_program", "no_such_program"),
    ],
)
def test_a_wrong_command_is_found(line, reason, check):
    (command,) = find_commands(f"```bash\n{line}\n```\n", "page.md")
    with pytest.raises((UserError, SystemExit, AssertionError, ImportError), match=re.escape(reason)):
        check(command)


def test_commands_are_split_as_a_shell_does():
    text = (
        "Text with `python train.py seed=1 [more]` in it.\n\n"
        "```bash\n# comment\nA=1 python tune.py 'a b' \\\n    c=[1,2]   # why\n"
        "python x.py > out.txt 2>&1 && ls | cat\ncat > s.yaml <<'EOF'\na: 1\nEOF\n```\n"
        "```text\npython y.py\n```\n"
    )
    assert [(command.place, *command.words) for command in find_commands(text, "p.md")] == [
        ("p.md:5", "python", "tune.py", "a b", "c=[1,2]"),
        ("p.md:7", "python", "x.py"),
        ("p.md:7", "ls"),
        ("p.md:7", "cat"),
        ("p.md:1", "python", "train.py", "seed=1"),
    ]
    more = "Write `b.yaml`, as `c.yaml`:\n\n```yaml\nb: 2\n```\n\nNo file:\n\n```yaml\nd: 3\n```\n"
    assert find_files(text + more) == {"s.yaml": "a: 1\n", "b.yaml": "b: 2\n"}


def check_command(command: Command, parse: Callable[..., argparse.Namespace]) -> None:
    """Raise UserError, SystemExit, AssertionError or ImportError if a command cannot work."""
    program, *arguments = map(_fill_in, command.words)
    program = program.removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        _check_python(arguments, parse)
    elif program == "ray":
        _check_ray(arguments)
    elif "/" in program:
        assert os.access(REPOSITORY / program, os.X_OK), f"there is no program {program}"
    else:
        assert program in OTHER_PROGRAMS, f"{program} is not in OTHER_PROGRAMS"
        if program == "pip":
            _check_pip(arguments)


def _fill_in(word: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        word = re.sub(rf"(?<![\w]){re.escape(placeholder)}(?!\w)", value, word)
    return word


def _check_python(arguments: Sequence[str], parse: Callable[..., argparse.Namespace]) -> None:
    script, *rest = arguments
    if script == "-m":
        module, *rest = rest
        if module not in _OTHER_MODULES:
            _check_module(module, rest)
        elif module == "pip":
            _check_pip(rest)
        return
    assert (REPOSITORY / script).is_file(), f"there is no {script}"
    if script in ("tune.py", "train.py"):
        _check_hydra(script, rest, parse)
    elif script in _LAUNCHERS:
        _make_results(rest)
        importlib.import_module(_module_name(script)).main(["--dry-run", *rest])
    else:
        _check_module(_module_name(script), rest)


def _module_name(script: str) -> str:
    return script.removesuffix(".py").replace("/", ".")


def _check_hydra(script: str, arguments: Sequence[str], parse: Callable[..., argparse.Namespace]) -> None:
    given = parse(get_args_parser(), list(arguments))
    for overrides in expand_multirun(given.overrides) if given.multirun else [given.overrides]:
        _make_results(overrides)
        config = compose("tune" if script == "tune.py" else "train", overrides)
        if script != "tune.py" or config.sweep.status:
            continue
        if config.sweep.resume:
            for key in (item.partition("=")[0] for item in overrides):
                assert key in _CHANGEABLE_KEYS, f"{key} cannot change when a sweep is resumed"
            continue
        space = load_space(config.search_space)
        bind_scheduler(instantiate(config.scheduler), instantiate(config.sweep), space)


def _make_results(overrides: Sequence[str]) -> None:
    """Write what an earlier sweep would have left, where a command uses its results."""
    for item in overrides:
        key, _, value = item.partition("=")
        if key == "best" and value.startswith("outputs/"):
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).write_text(yaml.safe_dump({"overrides": ["optimizer.lr=0.01"]}), encoding="utf-8")
        if key == "sweep.resume" and value.startswith("outputs/"):
            write_begun_sweep(Path(value).absolute(), [f"sweep.name={Path(value).name}"])


def _check_module(name: str, arguments: Sequence[str]) -> None:
    if name == "handpose.sweep.audit":  # without options
        assert len(arguments) == 1, "give the folder of a sweep"
        return
    if name in ("benchmarks.cheap_sweep", "cluster.sweep", "docs.make_configuration"):  # arguments of tune.py, or none
        compose("tune", [item for item in arguments if not item.startswith("--")])
        return
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [name, *arguments])
        with pytest.raises(_Parsed) as parsed:
            module.main()
    compose("tune", getattr(parsed.value.args[0], "overrides", []))


def _check_ray(arguments: Sequence[str]) -> None:
    from ray.scripts.scripts import cli

    assert arguments[0] in cli.commands, f"ray has no command {arguments[0]}"


def _check_pip(arguments: Sequence[str]) -> None:
    for option, file in pairwise(arguments):
        assert option != "-r" or Path(file).is_file(), f"there is no {file}"


SMALL = [
    *("data.source.num_train=60", "data.source.num_eval=12", "data.source.num_blocks=2", "data.image_size=64"),
    *("data.batch_size=8", "model.encoder.name=lcnet_035", "trainer.accelerator=cpu", "trainer.max_epochs=2"),
]
SWEEP = "outputs/sweeps/hands"
CHECKPOINT = f"{SWEEP}/retrain/checkpoints/last.ckpt"
RUNS = {
    "python tune.py": [
        *SMALL,
        *("sweep.name=hands", "sweep.num_trials=2", "sweep.max_epochs=2", "sweep.gpus_per_trial=0"),
        *("sweep.confirm.top_k=1", "sweep.confirm.seeds=1", "sweep.preflight=off", "sweep.max_concurrent=1"),
    ],
    "python tune.py sweep.status=": [SWEEP],
    "python tune.py sweep.resume=": [SWEEP, "sweep.num_trials=3"],
    "python -m handpose.report": [SWEEP],
    "python -m handpose.sweep.audit": [SWEEP],
    "python -m handpose.sweep.why": [SWEEP, "0"],
    "python -m handpose.sweep.status": [SWEEP, "--json"],
    "python -m handpose.sweep.control": [SWEEP],
    "python train.py best=": [f"{SWEEP}/best.yaml", "trainer.max_epochs=1"],
    "python -m handpose.evaluation --checkpoint": [CHECKPOINT, "--split", "val"],
    "python -m handpose.data.synthetic --sheet": ["sheet.png", "--num", "4"],
    "python -m handpose.predict": ["sheet.png", "--checkpoint", CHECKPOINT, "--crop"],
    "python -m handpose.export --checkpoint": [CHECKPOINT, "--output", "hand.onnx"],
}
"""How commands of the pages begin -> what they go on with here, where each uses what the ones before have left."""


@pytest.mark.slow
def test_a_sweep_and_what_a_reader_does_with_it_run_in_small_in_an_ascii_locale(tmp_path):
    """The commands run one after another in a process that imports the libraries once."""
    folder = tmp_path / "Größe"
    folder.mkdir()
    documented = [" ".join(command.words).removeprefix(".venv/bin/") for command in COMMANDS]
    commands = []
    for beginning, (first, *more) in RUNS.items():
        assert any(line.startswith(beginning) for line in documented), f"no page has a command {beginning}"
        joined = f"{beginning}{first}" if beginning.endswith("=") else f"{beginning} {first}"
        _, *words = joined.split()
        words = [str(REPOSITORY / word) if word in ("tune.py", "train.py") else word for word in words]
        commands.append([*words, *more])
    names = ("LC_", "LANG", "PYTHONUTF8", "DIR_SCRATCH", "MP_DATA")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment |= {"PYTHONPATH": str(REPOSITORY)} | ASCII
    done = subprocess.run(command_line(*commands), cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode("utf-8")
    shown = done.stdout.decode("utf-8").split("\f\n")[1]
    assert "2/2 trials" in shown
    for name in ("report.html", "retrain/metrics.json", "retrain/checkpoints/evaluation-val/evaluation.json"):
        assert (folder / SWEEP / name).is_file()
    assert (folder / "hand.onnx").is_file()
