"""The program that gives commands to a sweep by its URL: the process that runs the sweep is simulated in a thread."""

import contextlib
import re
import shutil
import stat
import threading

import pytest

from handpose.sweep import control as control_program
from handpose.sweep.audit.audit import audit
from handpose.sweep.control import main
from handpose.sweep.record.events import EVENTS_FILE, SweepSteered, TrialSuggested, read_events
from handpose.sweep.storage import folder_sync, lease
from handpose.sweep.storage.folder_sync import FolderSync
from handpose.sweep.storage.object_store import ObjectStore
from handpose.sweep.storage.stored_sweep import download_sweep
from tests.sweep.whole_sweep import WholeSweep


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A sweep of 6 trials of which some have reported, with its store; its process has ended."""
    place = tmp_path_factory.mktemp("begun")
    WholeSweep(place / "sweep", "scheduler.reduction_factor=2", "searcher=random").run(num_reports=5, last=None)
    made = FolderSync(place / "sweep", ObjectStore(f"file://{place}/store/sweep"))
    made.connect()
    made.finish(timeout_s=0.0)
    return place


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_sync, "_COMMANDS_EVERY_S", 0.05)
    monkeypatch.setattr(folder_sync, "_ANSWERS_EVERY_S", 0.02)
    monkeypatch.setattr(control_program, "_LOOK_IN_STORE_EVERY_S", 0.02)
    monkeypatch.setattr(lease, "_EXPIRY_S", 0.0)
    return shutil.copytree(begun, tmp_path / "place")


@pytest.fixture
def url(place):
    return f"file://{place}/store/sweep"


@pytest.fixture
def control(url, capsys):
    """Runs the program. Returns its exit status and what it prints."""

    def run(*arguments, place=url):
        try:
            status = main([place, *arguments])
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@contextlib.contextmanager
def run_beside(folder, url):
    """A process that keeps its sweep in the store and looks for commands, in a thread."""
    synced = FolderSync(folder, ObjectStore(url))
    synced.connect()
    is_over, is_ready = threading.Event(), threading.Event()

    def look():
        process = WholeSweep.from_folder(folder).process()
        synced.start()
        is_ready.set()
        while not is_over.wait(0.02):
            process.inbox.process(at_once=True)
        process.leave()

    thread = threading.Thread(target=look)
    thread.start()
    assert is_ready.wait(30)
    yield
    is_over.set()
    thread.join()
    synced.finish(timeout_s=0.0)


def list_stored(url, control):
    return [re.sub(r"^\S+ \S+  ", "", line) for line in control(place=url)[1].splitlines()]


def test_a_running_sweep_answers(control, place, url):
    with run_beside(place / "sweep", url):
        assert control("stop", "0") == (0, "accepted: trial 0 is stopped\n")
        refusal = "refused: trial 0 is stopped; only a trial that has not ended can be stopped"
        assert control("stop", "0") == (2, f"{refusal}\n")
        assert control("add", "optimizer.lr=3e-3 heatmap.sigma=0.05")[0] == 0
        assert control("--wait-s", "10", "slots", "2", place=str(place / "sweep"))[0] == 0, "in the folder, as before"
        expected = ["stop 0: accepted: trial 0 is stopped", f"stop 0: {refusal}"]
        assert list_stored(url, control)[:2] == expected
    assert [line.partition(":")[0] for line in list_stored(url, control)] == [
        *("stop 0", "stop 0", "add 'optimizer.lr=0.003 heatmap.sigma=0.05'", "slots 2")
    ]
    for file in (place / "sweep" / "control").glob("*[0-9a-f].json"):
        assert file.name.endswith(".answer.json") or stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_command_waits_in_the_store_and_is_executed_on_the_machine_that_resumes_the_sweep(control, place, url):
    status, text = control("--wait-s", "0", "trials", "7")
    assert status == 75
    assert f"waiting: no process runs the sweep; python tune.py sweep.resume={url} executes it" in text
    assert list_stored(url, control) == ["trials 7: waiting"]
    shutil.rmtree(place / "sweep")
    download_sweep(url, place / "sweep")
    synced = FolderSync(place / "sweep", ObjectStore(url))
    synced.connect()
    WholeSweep.from_folder(place / "sweep").run()
    synced.finish(timeout_s=0.0)
    events = read_events(place / "sweep" / EVENTS_FILE)
    assert sum(isinstance(event, TrialSuggested) for event in events) == 7
    assert sum(isinstance(event, SweepSteered) for event in events) == 1
    assert list_stored(url, control)[0].startswith("trials 7: accepted: the sweep has 7 trials")


def test_a_command_that_waits_is_withdrawn_by_removing_its_file(control, place, url):
    text = control("--wait-s", "0", "trials", "7")[1]
    file = re.search(r"to withdraw it, remove (\S+)", text)[1]
    assert file.startswith(f"{url}/control/")
    ObjectStore(url).remove(file.removeprefix(f"{url}/"))
    assert control() == (0, "no command was given\n")


def test_a_process_that_does_not_answer_is_described(control, url, monkeypatch):
    ObjectStore(url).write("owner.json", b'{"id": "x", "host": "gpu7", "pid": 12, "beat": 3}')
    monkeypatch.setattr(control_program, "RENEW_EVERY_S", 0.01)
    text = control("--wait-s", "0.1", "pause")[1]
    assert (
        "process 12 on gpu7, which ran the sweep, does not answer; if it has ended, python tune.py sweep.resume="
        in text
    )
    assert "has not answered yet" in control("--wait-s", "0", "pause")[1]


def test_a_command_to_a_sweep_whose_trials_have_ended_waits(control, place, url):
    WholeSweep.from_folder(place / "sweep").run()
    synced = FolderSync(place / "sweep", ObjectStore(url))
    synced.connect()
    assert "the trials of the sweep have ended" in control("--wait-s", "0", "trials", "8")[1]
    synced.finish(timeout_s=0.0)
    assert not any(audit(place / "sweep"))


@pytest.mark.parametrize("arguments", [("stop", "3"), ()])
def test_a_url_without_a_sweep_is_a_sentence(control, place, arguments):
    for name in ("none", "store"):
        status, text = control(*arguments, place=f"file://{place}/{name}")
        assert status == 2
        assert "has no sweep: there is no sweep.yaml in it, or no such bucket; give the URL of a sweep" in text
        assert not list((place / "store").glob("control"))


@pytest.mark.parametrize("call", ["read", "write"])
def test_a_store_that_refuses_is_a_sentence(control, monkeypatch, call):
    def refuse(*args, **options):
        raise OSError("When writing: AWS Error ACCESS_DENIED during PutObject operation: Access Denied")

    monkeypatch.setattr(ObjectStore, call, refuse)
    status, text = control("stop", "3")
    assert status == 2
    assert text.count("\n") == 1
    assert "ACCESS_DENIED" in text
    assert "cannot be " in text


def test_a_store_that_is_lost_while_the_program_waits_is_a_sentence(control, monkeypatch, url):
    def refuse(*args, **options):
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(control_program.StoredInterventions, "read_answer", refuse)
    status, text = control("stop", "3")
    assert status == 75
    assert f"waiting: the command is in {url}, which does not answer now (AWS Error NETWORK_CONNECTION)" in text


def test_a_mistake_on_the_command_line_writes_no_command(control, place):
    status, text = control("trials", "0")
    assert (status, "must be a whole number of at least 1" in text) == (2, True)
    assert not (place / "store/sweep/control").exists()
