"""Commands in an object store: they reach the folder of the sweep once, and their answers return after the events."""

import json
import os
import shutil
import stat

import pytest

from handpose.errors import UserError
from handpose.sweep.driver.intervention_inbox import InterventionInbox
from handpose.sweep.record.events import SpaceRecord, SweepSteered, read_events
from handpose.sweep.record.interventions import InterventionAnswer, InterventionFiles, make_intervention
from handpose.sweep.storage import folder_sync as folder_syncs
from handpose.sweep.storage import lease
from handpose.sweep.storage.control_sync import ControlSync, StoredInterventions, download_interventions
from handpose.sweep.storage.folder_sync import FolderSync
from handpose.sweep.storage.lease import LeaseLostError
from handpose.sweep.storage.object_store import ObjectStore
from tests.sweep.controller.test_controller import SPACE, compute_falling_loss, make_schedulers
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.storage.test_checkpoint_files import UnreliableStore
from tests.sweep.sweeps import make_settings

ACCEPTED, REFUSED = InterventionAnswer(True, "done"), InterventionAnswer(False, "no")


@pytest.fixture
def store(tmp_path):
    return UnreliableStore(f"file://{tmp_path}/store/sweep")


@pytest.fixture
def stored(store):
    return StoredInterventions(store)


@pytest.fixture
def make_sync(tmp_path, store):
    """Makes the copying of a process on a machine, and the interventions in its folder."""

    def make(machine="sweep", check_lease=lambda: None):
        folder = tmp_path / machine
        folder.mkdir(exist_ok=True)
        return ControlSync(folder, store, check_lease=check_lease), InterventionFiles(folder)

    return make


def test_a_command_in_the_store_is_a_file_of_this_user_in_the_folder(make_sync, stored, tmp_path):
    sync, files = make_sync()
    given = make_intervention("stop", trial=17)
    stored.give(given)
    sync.sync_commands()
    assert files.list_ids() == [given.id]
    assert files.read(given.id) == given
    found = (tmp_path / "sweep/control" / f"{given.id}.json").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, os.geteuid())


def test_names_that_are_no_ids_are_ignored(make_sync, store):
    sync, files = make_sync()
    name = make_intervention("pause").id
    for each in ("x.json", f"{name}.json.part", f"sub/{name}.json", f"{name}.answer.json", f"{name[:-1]}٣.json"):
        store.write(f"control/{each}", b"{}")
    sync.connect()
    sync.sync_commands()
    assert files.list_ids() == []
    assert files.read_answer(name) is None


def test_a_command_of_the_folder_is_in_the_store_too(make_sync, stored):
    sync, files = make_sync()
    given = make_intervention("pause")
    files.write(given)
    sync.sync_commands()
    assert json.loads(stored.read_content(given.id))["action"] == "pause"


def test_a_file_that_others_can_change_is_not_uploaded(make_sync, stored, tmp_path):
    """A process on another machine would trust it."""
    sync, files = make_sync()
    file = files.write(make_intervention("pause"))
    file.chmod(0o666)
    sync.sync_commands()
    assert stored.list_ids() == ([], [])


@pytest.mark.parametrize("place", ["folder", "store"])
def test_a_command_that_is_withdrawn_in_one_place_does_not_return_from_the_other(make_sync, stored, place):
    sync, files = make_sync()
    withdrawn, kept = make_intervention("pause"), make_intervention("resume")
    for each in (withdrawn, kept):
        stored.give(each)
    sync.sync_commands()
    (files if place == "folder" else stored).withdraw(withdrawn.id)
    for _ in range(2):
        sync.sync_commands()
        assert files.list_ids() == stored.list_ids()[0] == [kept.id]


def test_a_command_with_an_answer_stays_in_the_folder_as_a_record(make_sync, stored):
    sync, files = make_sync()
    given = make_intervention("pause")
    stored.give(given)
    sync.sync_commands()
    files.write_answer(given.id, ACCEPTED)
    stored.withdraw(given.id)
    for _ in range(2):
        sync.sync_commands()
        assert (files.list_ids(), stored.list_ids()[0]) == ([given.id], [])


def test_an_answer_is_uploaded_once_and_again_when_it_changes(make_sync, stored):
    sync, files = make_sync()
    given = make_intervention("pause")
    files.write(given)
    sync.sync_commands()
    assert sync.find_new_answers(with_changed=True) == {}
    files.write_answer(given.id, REFUSED)
    assert sync.find_new_answers(with_changed=False) == {given.id: REFUSED}
    sync.upload_answers({given.id: REFUSED})
    assert stored.read_answer(given.id) == REFUSED
    assert sync.find_new_answers(with_changed=True) == {}
    files.write_answer(given.id, ACCEPTED)
    assert sync.find_new_answers(with_changed=False) == {}
    assert sync.find_new_answers(with_changed=True) == {given.id: ACCEPTED}


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [(None, REFUSED, REFUSED), (None, ACCEPTED, ACCEPTED), (ACCEPTED, REFUSED, REFUSED), (REFUSED, ACCEPTED, REFUSED)],
)
def test_a_refusal_counts_on_every_machine(make_sync, stored, here, there, expected):
    sync, files = make_sync()
    given = make_intervention("pause")
    stored.give(given)
    stored.write_answer(given.id, there)
    if here is not None:
        files.write(given)
        files.write_answer(given.id, here)
    sync.connect()
    assert files.read_answer(given.id) == expected
    assert files.list_waiting(()) == ([] if expected is REFUSED else [given.id])
    assert sync.find_new_answers(with_changed=True) == ({} if expected == there else {given.id: expected})


def test_a_process_that_has_lost_the_sweep_changes_nothing(make_sync, stored):
    def check_lease():
        raise LeaseLostError

    sync, files = make_sync(check_lease=check_lease)
    given = make_intervention("pause")
    files.write(given)
    with pytest.raises(LeaseLostError):
        sync.sync_commands()
    with pytest.raises(LeaseLostError):
        sync.upload_answers({given.id: ACCEPTED})
    assert stored.list_ids() == ([], [])


def test_commands_and_answers_are_downloaded_to_be_read(store, stored, tmp_path):
    first, second = make_intervention("pause"), make_intervention("resume")
    for each in (first, second):
        stored.give(each)
    stored.write_answer(second.id, REFUSED)
    (tmp_path / "copy").mkdir()
    download_interventions(store, tmp_path / "copy")
    files = InterventionFiles(tmp_path / "copy")
    assert {name: files.read(name) for name in files.list_ids()} == {first.id: first, second.id: second}
    assert (files.read_answer(first.id), files.read_answer(second.id)) == (None, REFUSED)
    store.is_out = True
    with pytest.raises(UserError, match="cannot be read"):
        download_interventions(store, tmp_path / "copy")


# --- with a sweep -----------------------------------------------------------------------------------------------------


class SteeredSweep(SimulatedSweep):
    """A simulated sweep with an inbox, which can be resumed in an empty folder."""

    def start(self):
        super().start()
        self.inbox = InterventionInbox(self.settings.path, self.controller, show_note=lambda text: None)
        self.inbox.process(at_once=True)

    def lose(self):
        """The machine is lost. Another one resumes the sweep from the store."""
        self.kill()
        shutil.rmtree(self.settings.path)
        self.start()

    def list_actions(self):
        return [event.action for event in read_events(self.file) if isinstance(event, SweepSteered)]


@pytest.fixture
def swept(tmp_path, write_space, monkeypatch):
    monkeypatch.setattr(lease, "_EXPIRY_S", 0.0)
    settings = make_settings(
        tmp_path / "sweep", name="sweep", num_trials=6, max_epochs=9, storage=f"file://{tmp_path}/store"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def connect():
        settings.path.mkdir(exist_ok=True)
        made = FolderSync(settings.path, UnreliableStore(settings.storage_url))
        made.connect()
        return made

    scheduler = make_schedulers(write_space(SPACE))["stop"]
    return SteeredSweep(settings, scheduler, compute_falling_loss, folder_sync=connect, scratch=scratch)


@pytest.mark.parametrize("stored_part", ["nothing", "events", "answer"])
def test_a_command_is_executed_once_although_the_machine_is_lost_after_it(swept, stored, stored_part):
    given = make_intervention("trials", limits={"num_trials": 9})
    stored.give(given)
    swept.mirror._sync_control(with_commands=True)
    assert swept.inbox.process(at_once=True)
    if stored_part == "events":
        swept.mirror._copy_events()
    elif stored_part == "answer":
        swept.mirror._sync_control(with_commands=False)
    swept.lose()
    swept.mirror._sync_control(with_commands=True)
    stored.give(given)  # uploaded again
    swept.mirror._sync_control(with_commands=True)
    swept.inbox.process(at_once=True)
    assert swept.list_actions() == ["trials"]
    assert stored.read_answer(given.id).is_accepted
    swept.log.close()


def test_a_refused_command_is_not_executed_on_the_next_machine(swept, stored):
    given = make_intervention("resume")
    stored.give(given)
    swept.mirror._sync_control(with_commands=True)
    swept.inbox.process(at_once=True)
    swept.mirror._sync_control(with_commands=False)
    assert stored.read_answer(given.id) == InterventionAnswer(False, "the sweep is not paused")
    pause = make_intervention("pause")
    stored.give(pause)
    swept.lose()
    assert swept.list_actions() == ["pause"], "the resume was refused before, and is not executed now"
    swept.log.close()


@pytest.mark.parametrize("answer", [None, ACCEPTED])
def test_a_search_space_in_python_is_not_executed_if_it_comes_from_the_store(swept, stored, tmp_path, answer):
    trace = tmp_path / "it_was_run"
    text = (
        f"open({str(trace)!r}, 'w')\ndef space(trial):\n    return {{'optimizer.lr': trial.suggest_float('a', 0, 1)}}\n"
    )
    given = make_intervention("space", space=SpaceRecord("a.py", text))
    stored.give(given)
    if answer is not None:
        stored.write_answer(given.id, answer)  # somebody else has written it
    swept.mirror._sync_control(with_commands=True)
    assert not swept.inbox.process(at_once=True)
    swept.mirror._sync_control(with_commands=False)
    said = stored.read_answer(given.id)
    assert (said.is_accepted, "must be given in the folder" in said.sentence) == (False, True)
    swept.lose()
    assert swept.list_actions() == []
    assert not trace.exists()
    yaml = make_intervention("space", space=SpaceRecord("a.yaml", "optimizer.lr: interval(0.1, 0.2)\n"))
    stored.give(yaml)
    swept.mirror._sync_control(with_commands=True)
    assert swept.inbox.process(at_once=True)
    assert swept.list_actions() == ["space"]
    swept.log.close()


def test_a_command_given_while_no_process_runs_is_executed_when_the_sweep_is_resumed(swept, stored):
    swept.mirror.finish(timeout_s=0.0)
    stored.give(make_intervention("slots", limits={"max_concurrent": 2}))
    swept.lose()
    assert swept.list_actions() == ["slots"]
    swept.log.close()


@pytest.mark.parametrize("content", [b"{}", b"x" * 100_000, b'{"id": "other", "given_at": 0, "action": "pause"}'])
def test_a_file_that_is_no_command_is_refused(swept, store, stored, content):
    name = make_intervention("pause").id
    store.write(f"control/{name}.json", content)
    swept.mirror._sync_control(with_commands=True)
    assert not swept.inbox.process(at_once=True)
    swept.mirror._sync_control(with_commands=False)
    assert not stored.read_answer(name).is_accepted
    swept.log.close()


def test_an_answer_is_in_the_store_only_after_its_event(swept, stored, monkeypatch):
    given, written = make_intervention("pause"), []
    stored.give(given)
    swept.mirror._sync_control(with_commands=True)
    swept.inbox.process(at_once=True)
    write = ObjectStore.write
    monkeypatch.setattr(ObjectStore, "write", lambda self, *args: (written.append(args[0]), write(self, *args)))
    swept.mirror._sync_control(with_commands=False)
    assert written == ["events/000000.jsonl", f"control/{given.id}.answer.json"]
    swept.log.close()


def test_the_thread_downloads_a_command_and_uploads_its_answer_also_after_an_outage(swept, stored, monkeypatch, capsys):
    monkeypatch.setattr(folder_syncs, "_COMMANDS_EVERY_S", 0.02)
    monkeypatch.setattr(folder_syncs, "_ANSWERS_EVERY_S", 0.01)
    monkeypatch.setattr(folder_syncs, "_MAX_DELAY_S", 0.02)
    store, given = swept.mirror._store, make_intervention("pause")
    store.is_out = True
    swept.mirror.start()
    while store.num_refused < 5:
        pass
    store.is_out = False
    stored.give(given)
    while stored.read_answer(given.id) is None:
        swept.inbox.process(at_once=True)
    swept.mirror.finish(timeout_s=0.0)
    assert stored.read_answer(given.id).is_accepted
    assert "Traceback" not in capsys.readouterr().err
    swept.log.close()


def test_a_store_with_a_forbidden_name_is_reported_once(swept, monkeypatch, capsys):
    def refuse():
        raise UserError("the store has a file '../x'")

    monkeypatch.setattr(swept.mirror._control, "sync_commands", refuse)
    for _ in range(3):
        swept.mirror._sync_control(with_commands=True)
    assert capsys.readouterr().err.count("are ignored: the store has a file '../x'") == 1
    swept.log.close()


def test_a_look_for_commands_is_one_request(swept, store, monkeypatch):
    """The look for answers is none."""
    swept.mirror.sync_changes()
    calls = []
    for name in ("read", "write", "list_files", "upload"):
        monkeypatch.setattr(ObjectStore, name, lambda self, *args, called=name, **options: calls.append(called) or {})
    swept.mirror._sync_control(with_commands=True)
    assert calls == ["list_files"]
    swept.mirror._sync_control(with_commands=False)
    assert calls == ["list_files"]
    swept.log.close()
