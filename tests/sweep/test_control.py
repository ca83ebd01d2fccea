"""The program that gives commands to a sweep, beside a process that runs the sweep and is simulated in a thread."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest

from handpose.config_files import REPOSITORY
from handpose.locks import hold_lock
from handpose.sweep.audit.audit import audit
from handpose.sweep.control import main
from handpose.sweep.driver.resume import load_recorded_task
from handpose.sweep.record.events import EVENTS_FILE, SweepOpened, SweepSteered, TrialSuggested, read_events
from handpose.sweep.record.settings import LOCK
from handpose.yaml_files import read_yaml
from tests.sweep.whole_sweep import WholeSweep

HALVING = "scheduler.reduction_factor=2"
RANDOM = (HALVING, "searcher=random")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A sweep of 6 trials of which some have reported, and whose process was killed."""
    folder = tmp_path_factory.mktemp("begun") / "sweep"
    WholeSweep(folder, *RANDOM).run(num_reports=5, last=None)
    return folder


@pytest.fixture
def folder(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "sweep")


@pytest.fixture
def run_beside(folder):
    """Makes a process that only looks for commands, in a thread that holds the lock of the sweep."""
    is_over, threads = threading.Event(), []

    def look(is_ready):
        with hold_lock(folder / LOCK):
            process = WholeSweep.from_folder(folder).process()
            is_ready.set()
            while not is_over.wait(0.02):
                process.inbox.process(at_once=True)
            process.leave()

    def start():
        is_ready = threading.Event()
        threads.append(threading.Thread(target=look, args=(is_ready,)))
        threads[-1].start()
        assert is_ready.wait(30)

    yield start
    is_over.set()
    for thread in threads:
        thread.join()


@pytest.fixture
def control(folder, capsys):
    """Runs the program. Returns its exit status and what it prints."""

    def run(*arguments):
        try:
            status = main([str(folder), *arguments])
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_a_running_sweep_answers_within_two_seconds(control, run_beside, folder):
    run_beside()
    began = time.monotonic()
    assert control("stop", "0") == (0, "accepted: trial 0 is stopped\n")
    assert time.monotonic() - began < 2
    status, text = control("stop", "0")
    assert (status, text) == (2, "refused: trial 0 is stopped; only a trial that has not ended can be stopped\n")
    assert control("retry", "0")[0] == 0
    assert control("keep", "0")[1].startswith("accepted: trial 0 trains to sweep.max_epochs=4")
    assert control("add", "optimizer.lr=3e-3 heatmap.sigma=0.05")[0] == 0
    assert control("add", "optimizer.lr=4e-3", "heatmap.sigma=0.06")[0] == 0
    assert control("trials", "9") == (0, "accepted: the sweep has 9 trials, of which 3 have been started\n")
    assert control("slots", "2")[0] == 0
    assert control("pause")[0] == 0
    assert control("resume")[0] == 0
    status, text = control("budget", "time_budget_s=3600", "sweep.stop_when=0.5")
    assert (status, text) == (0, "accepted: sweep.time_budget_s=3600, sweep.stop_when=0.5\n")
    lines = control()[1].splitlines()
    assert [re.sub(r"^\S+ \S+  ", "", line).partition(":")[0] for line in lines] == [
        "stop 0",
        "stop 0",
        "retry 0",
        "keep 0",
        "add 'optimizer.lr=0.003 heatmap.sigma=0.05'",
        "add 'optimizer.lr=0.004 heatmap.sigma=0.06'",
        "trials 9",
        "slots 2",
        "pause",
        "resume",
        "budget time_budget_s=3600.0 stop_when=0.5",
    ]
    assert "refused: trial 0 is stopped" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "optimizer.lr=7"), "optimizer.lr=7 is out of range"),
        (("add", "optimizer.rate=0.1"), "does not search optimizer.rate"),
        (("add", "optimizer.lr=0.005 heatmap.sigma=0.04"), "would give the same training again"),
        (("trials", "1"), "give at least this number"),
        (("stop", "17"), "the sweep has no trial 17; its trials are 0 to 2"),
        (("resume",), "the sweep is not paused"),
        (("budget", "gpu_hours=2"), "trials use no GPU"),
    ],
)
def test_a_running_sweep_refuses_in_a_sentence(control, run_beside, arguments, sentence):
    run_beside()
    status, text = control(*arguments)
    assert status == 2
    assert text.startswith("refused: ")
    assert sentence in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "optimizer.lr"), "write key=value"),
        (("add", "optimizer.lr=1,2"), "is a search range"),
        (("add", "optimizer.lr=1", "optimizer.lr=2"), "each key once"),
        (("trials", "0"), "must be a whole number of at least 1"),
        (("budget", "hours=2"), "hours is not one of time_budget_s, gpu_hours, stop_when"),
        (("budget", "time_budget_s=much"), "is not an amount"),
        (("budget", "time_budget_s=-1"), "must be a number above 0"),
        (("stop", "first"), "invalid int value"),
        (("stop",), "required: TRIAL"),
        (("end", "3"), "invalid choice"),
        (("--wait-s", "-1", "pause"), "--wait-s"),
    ],
)
def test_a_mistake_on_the_command_line_writes_no_command(control, folder, arguments, sentence):
    status, text = control(*arguments)
    assert status == 2
    assert sentence in text
    assert not (folder / "control").exists()


def test_a_command_to_a_stopped_sweep_waits_and_is_executed_when_it_is_resumed(control, folder):
    status, text = control("--wait-s", "0", "trials", "7")
    assert status == 75
    assert "waiting: no process runs the sweep; python tune.py sweep.resume=" in text
    assert control()[1].endswith("trials 7: waiting\n")
    WholeSweep.from_folder(folder).run()
    assert sum(isinstance(event, TrialSuggested) for event in read_events(folder / EVENTS_FILE)) == 7
    assert "accepted" in control()[1]
    assert not any(audit(folder))


def test_a_command_to_a_sweep_whose_trials_have_ended_waits(control, folder):
    WholeSweep.from_folder(folder).run()
    with hold_lock(folder / LOCK):
        status, text = control("--wait-s", "0", "trials", "8")
    assert status == 75
    assert "the trials of the sweep have ended" in text


def test_limits_survive_a_resume_and_the_newest_statement_counts(control, folder):
    sweep = WholeSweep.from_folder(folder)

    def resume(*given):
        """What tune.py does before it opens the sweep; returns its limits."""
        process = sweep.resume(*given).process()
        settings = process.state.history.settings
        process.run(1)
        process.leave()
        return settings.num_trials, settings.max_concurrent, settings.time_budget_s

    for arguments in (("trials", "8"), ("slots", "3"), ("budget", "time_budget_s=700")):
        assert control("--wait-s", "0", *arguments)[0] == 75
    assert resume() == (8, 3, 700.0)
    assert read_yaml(folder / "sweep.yaml")["config"]["sweep"]["num_trials"] == 6, "so far it is an event only"
    assert resume() == (8, 3, 700.0)
    assert read_yaml(folder / "sweep.yaml")["config"]["sweep"]["num_trials"] == 8
    assert resume("sweep.num_trials=7") == (7, 3, 700.0)
    assert resume() == (7, 3, 700.0)
    control("--wait-s", "0", "trials", "9")
    assert resume("sweep.time_budget_s=900") == (9, 3, 900.0)
    assert resume() == (9, 3, 900.0)
    events = read_events(folder / EVENTS_FILE)
    assert [event.num_trials for event in events if isinstance(event, SweepOpened)][1:] == [6, 8, 7, 7, 7, 9]
    assert not any(audit(folder))


def test_an_override_wins_over_an_earlier_command_even_if_the_process_is_killed_before_it_opens_the_sweep(
    folder, control
):
    control("--wait-s", "0", "trials", "8")
    sweep = WholeSweep.from_folder(folder)
    sweep.process().leave()
    sweep.resume("sweep.num_trials=7")  # sweep.yaml is written, and then the process is killed
    assert load_recorded_task(folder, [], is_steered=True).config.sweep.num_trials == 7


def test_a_folder_without_a_sweep_is_a_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "stop", "3"])
    assert ended.value.code == 2
    assert "has no sweep" in capsys.readouterr().err


def test_a_sweep_without_commands_has_an_empty_list(control):
    assert control() == (0, "no command was given\n")


def test_a_command_file_of_another_user_is_ignored(control, folder, run_beside, monkeypatch):
    run_beside()
    name = "00000000000001-00000000"
    (folder / "control").mkdir()
    file = folder / "control" / f"{name}.json"
    file.write_text(json.dumps({"id": name, "given_at": 0.0, "action": "stop", "trial": 0}))
    file.chmod(0o666)
    time.sleep(0.3)
    assert control("pause")[0] == 0  # later ones are executed
    events = [event for event in read_events(folder / EVENTS_FILE) if isinstance(event, SweepSteered)]
    assert [event.action for event in events] == ["pause"]
    assert not (folder / "control" / f"{name}.answer.json").exists()


def test_it_starts_without_the_libraries_that_take_long_to_import():
    heavy = ["torch", "ray", "optuna", "tensorboard", "pandas"]
    code = f"import sys, handpose.sweep.control; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_option_has_help(capsys):
    for arguments in (["--help"], *(["x", name, "--help"] for name in ("stop", "add", "trials", "slots", "budget"))):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert "usage:" in capsys.readouterr().out


def test_another_space_is_checked_by_the_program_and_by_the_sweep(control, run_beside, folder, tmp_path):
    status, text = control("space", "defualt")
    assert (status, "did you mean default?" in text) == (2, True)
    file = tmp_path / "narrow.yaml"
    file.write_text("optimizer.lr: intervall(1e-4, 1e-3)\n")
    status, text = control("space", str(file))
    assert (status, f"{file}: cannot read optimizer.lr" in text) == (2, True)
    file.write_text(f"# {'x' * 2**16}\noptimizer.lr: interval(1e-4, 1e-3)\n")
    status, text = control("space", str(file))
    assert (status, "space narrow.yaml: it is too long" in text) == (2, True)
    assert not (folder / "control").exists()
    file.write_text("optimizer.lr: interval(1e-4, 1e-3)\n")
    run_beside()
    said = "trials are proposed from narrow.yaml from now on; the sweep has 6 trials, of which 3 have been started"
    assert control("space", str(file)) == (0, f"accepted: {said}\n")
    file.unlink()
    assert control("space", "default")[0] == 0
    assert [each.split("  ")[1].partition(":")[0] for each in control()[1].splitlines()] == [
        "space narrow.yaml",
        "space default.yaml",
    ]
    assert (folder / "search_space_2" / "narrow.yaml").read_text() == "optimizer.lr: interval(1e-4, 1e-3)\n"
    assert (folder / "search_space_3" / "default.yaml").is_file()
