"""A sweep that is kept in a store: machines are lost at any moment, and what is decided is what would have been."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import optuna
import pytest

from handpose.errors import UserError
from handpose.search.study import open_storage_for_reading
from handpose.sweep.analysis.status import print_status
from handpose.sweep.record.events import EpochReported, read_events
from handpose.sweep.storage import folder_sync as mirrors
from handpose.sweep.storage import lease as owner
from handpose.sweep.storage.folder_sync import FolderSync, SyncIncompleteError, sync_sweep_folder
from handpose.sweep.storage.lease import LEASE_FILE, Lease, LeaseLostError
from handpose.sweep.storage.object_store import ObjectStore
from handpose.sweep.storage.stored_sweep import (
    EVENT_CHUNKS_FOLDER,
    check_storage,
    download_events,
    download_sweep,
    open_sweep_for_reading,
)
from tests.sweep.analysis.test_status import write_sweep
from tests.sweep.controller.test_controller import SPACE, compute_falling_loss, make_schedulers
from tests.sweep.objectives import METRIC, curve, grows_in_a_store
from tests.sweep.simulation import SimulatedSweep
from tests.sweep.storage.test_checkpoint_files import UnreliableStore
from tests.sweep.sweeps import make_asha, make_settings, make_tpe, run_small_sweep


@pytest.fixture
def simulate(tmp_path, write_space, monkeypatch):
    """Makes a simulated sweep that is kept in a store; alone: in its folder only."""
    monkeypatch.setattr(mirrors, "_CHUNK_BYTES", 3000)
    monkeypatch.setattr(owner, "_EXPIRY_S", 0.0)  # seconds, that a process of before is given to say it is alive

    def made(kind, *, seed=0, is_late=False, alone=False, name="sweep"):
        url = None if alone else f"file://{tmp_path}/store"
        settings = make_settings(tmp_path / name, name=name, num_trials=12, max_epochs=9, storage=url)
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)

        def mirror():
            begun = FolderSync(settings.path, UnreliableStore(settings.storage_url))
            begun.connect()
            return begun

        scheduler = make_schedulers(write_space(SPACE))[kind]
        return SimulatedSweep(
            settings,
            scheduler,
            compute_falling_loss,
            seed=seed,
            is_late=is_late,
            folder_sync=None if alone else mirror,
            scratch=scratch,
        )

    return made


def run_with_losses(swept, generator, *, lost):
    """To the end; the machine, or only the process, is lost now and then. Returns how often the former was."""
    num_lost, next_loss = 0, 12
    while True:
        swept.fill()
        if swept.controller.is_over:
            break
        swept.step()
        if generator.random() < 0.3:
            swept.mirror.sync_changes()
            check_store_can_resume(swept)
        if swept.controller.history.num_reports >= next_loss:
            next_loss += generator.randrange(6, 20)
            swept.kill()
            if lost and generator.random() < 0.7:
                num_lost += 1
                shutil.rmtree(swept.settings.path)
            swept.start()
    swept.controller.close("finished")
    swept.mirror.finish(timeout_s=0.0)
    swept.log.close()
    return num_lost


def check_store_can_resume(swept):
    """Of every trial that is not over, by the events in the store, it has the newest checkpoint that these tell of."""
    folder = swept.scratch / "seen"
    shutil.rmtree(folder, ignore_errors=True)
    store = ObjectStore(swept.settings.storage_url)
    download_events(store, folder)
    newest, names = {}, set(store.list_files())
    for event in read_events(folder / "events.jsonl"):
        if isinstance(event, EpochReported):
            newest[event.trial] = event.checkpoint or newest.get(event.trial)
            if event.decision not in ("continue", "pause"):
                del newest[event.trial]
    assert {each.file for each in newest.values() if each is not None} <= names


@pytest.mark.parametrize("kind", ["stop", "promote", "population"])
@pytest.mark.parametrize("is_late", [False, True])
def test_a_sweep_whose_machine_is_lost_decides_what_one_left_alone_decides(simulate, kind, is_late):
    whole = simulate(kind, alone=True, name="alone").run()
    swept = simulate(kind, is_late=is_late)
    assert run_with_losses(swept, random.Random(kind), lost=True) >= 2
    assert swept.list_decisions() == whole.list_decisions()
    assert set(ObjectStore(swept.settings.storage_url).list_files("checkpoints")) == {
        each.file
        for trial in swept.controller.history.trials
        for each in swept.controller.history.retention.list_checkpoints(trial)
    }


def test_a_process_that_was_killed_goes_on_with_the_longer_log_of_its_folder(simulate):
    whole = simulate("promote", alone=True, name="alone").run()
    swept = simulate("promote")
    assert run_with_losses(swept, random.Random(1), lost=False) == 0
    assert swept.list_decisions() == whole.list_decisions()


def start_sweep(simulate, num_reports=20):
    swept = simulate("stop")
    while swept.controller.history.num_reports < num_reports:
        swept.fill()
        swept.step()
    return swept


def test_everything_a_user_wants_is_in_the_store_at_the_end_and_nothing_else(simulate):
    swept = start_sweep(simulate)
    folder = swept.settings.path
    for name in ("sweep.yaml", "study/journal.log", "tensorboard/trial_0000/events", "retrain/checkpoints/last.ckpt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (".lock", "trials/trial_0000/x", "retrain/.last.ckpt.7.part", "pictures/x.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    swept.mirror.sync_changes()
    names = set(ObjectStore(swept.settings.storage_url).list_files())
    assert "sweep.yaml" in names
    assert "study/journal.log" not in names  # it may know more than the events
    (folder / "retrain/checkpoints/last.ckpt").unlink()
    swept.mirror.finish(timeout_s=0.0)
    names = {
        name
        for name in ObjectStore(swept.settings.storage_url).list_files()
        if not name.startswith(("checkpoints", EVENT_CHUNKS_FOLDER))
    }
    assert names == {"sweep.yaml", "study/journal.log", "tensorboard/trial_0000/events"}


def test_a_file_that_an_earlier_process_has_copied_is_deleted_in_the_store_too(tmp_path):
    store = ObjectStore(f"file://{tmp_path}/store")
    folder = tmp_path / "sweep"
    for name in ("retrain/combined/metrics.json", "retrain/metrics.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "events.jsonl").touch()
    first = FolderSync(folder, store)
    first.connect()
    first.finish(timeout_s=0.0)
    assert "retrain/combined/metrics.json" in store.list_files()
    second = FolderSync(folder, store)
    second.connect()
    shutil.rmtree(folder / "retrain" / "combined")
    second.sync_all()
    second.finish(timeout_s=0.0)
    assert [name for name in store.list_files() if name.startswith("retrain/")] == ["retrain/metrics.json"]


def test_a_study_that_may_know_more_than_the_events_is_not_copied_at_the_end(simulate):
    """As when Ray was lost, so that the sweep could not be closed."""
    swept = start_sweep(simulate)
    (swept.settings.path / "study").mkdir(exist_ok=True)
    (swept.settings.path / "study" / "journal.log").write_text("more")
    (swept.settings.path / "trials.csv").write_text("all")
    swept.mirror.finish(timeout_s=0.0, with_study=False)
    names = ObjectStore(swept.settings.storage_url).list_files()
    assert "trials.csv" in names
    assert "study/journal.log" not in names
    assert LEASE_FILE not in names


def test_a_log_is_copied_in_segments_of_which_only_the_last_one_changes(simulate):
    swept = start_sweep(simulate)
    swept.mirror.sync_changes()
    before = ObjectStore(swept.settings.storage_url).list_files(EVENT_CHUNKS_FOLDER)
    for _ in range(6):
        swept.fill()
        swept.step()
    swept.mirror.sync_changes()
    after = ObjectStore(swept.settings.storage_url).list_files(EVENT_CHUNKS_FOLDER)
    assert len(before) >= 2
    assert all(after[name] == before[name] for name in sorted(before)[:-1])
    assert (
        b"".join(ObjectStore(swept.settings.storage_url).read(name) for name in sorted(after))
        == swept.file.read_bytes()
    )


def test_during_an_outage_the_thread_says_so_once_and_everything_is_copied_afterwards(simulate, capsys, monkeypatch):
    swept = start_sweep(simulate)
    swept.mirror._store.is_out = True
    swept.mirror._every_s = 0.01
    monkeypatch.setattr(mirrors, "_MAX_DELAY_S", 0.01)
    asked = swept.mirror._store.num_refused
    swept.mirror.start()
    while swept.mirror._store.num_refused < asked + 5:
        pass
    swept.mirror._store.is_out = False
    swept.mirror.finish(timeout_s=0.0)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "does not answer (AWS Error NETWORK_CONNECTION" in told[0]
    assert told[1].endswith("answers again")
    segments = ObjectStore(swept.settings.storage_url).list_files(EVENT_CHUNKS_FOLDER)
    assert sum(each.size_bytes for each in segments.values()) == swept.file.stat().st_size


def test_a_store_that_is_out_at_the_end_leaves_a_sweep_that_can_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mirrors, "_FINAL_TIMEOUT_S", 0.0)
    monkeypatch.setattr(mirrors, "ObjectStore", UnreliableStore)
    settings = make_settings(tmp_path / "sweep", storage=f"file://{tmp_path}/store")

    def swept():
        with sync_sweep_folder(settings) as folder_sync:
            settings.path.mkdir()
            (settings.path / "best.yaml").write_text("{}")
            folder_sync._store.is_out = True

    with pytest.raises(
        SyncIncompleteError, match=rf"lacks the latest part of it .* python tune.py sweep.resume={settings.path}"
    ):
        swept()
    assert "waiting for it" in capsys.readouterr().err


def test_logs_that_went_different_ways_are_a_sentence(simulate):
    swept = start_sweep(simulate)
    swept.mirror.sync_changes()
    swept.kill()
    lines = swept.file.read_text().splitlines(keepends=True)
    swept.file.write_text("".join(lines[:-3]) + lines[-1])
    with pytest.raises(UserError, match="have diverged since they were copied"):
        swept.start()


def test_two_processes_do_not_run_one_sweep(simulate, monkeypatch):
    swept = start_sweep(simulate)
    store = ObjectStore(swept.settings.storage_url)
    other = FolderSync(swept.settings.path, ObjectStore(swept.settings.storage_url))
    other.connect()  # after the first has been silent
    with pytest.raises(LeaseLostError, match=f"is run by process {os.getpid()} on"):
        swept.mirror.sync_changes()
    monkeypatch.setattr(owner, "_EXPIRY_S", 5.0)
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: other.sync_changes())
    with pytest.raises(UserError, match=r"is already running as process"):
        FolderSync(swept.settings.path, store).connect()
    other.finish(timeout_s=0.0)
    assert LEASE_FILE not in store.list_files()


class SlowStore(ObjectStore):
    """A store in which an upload waits until the test lets it continue."""

    def __init__(self, url):
        super().__init__(url)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def upload(self, file, name):
        self.has_begun.set()
        assert self.may_end.wait(30)
        super().upload(file, name)


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A sweep's folder with two files, and its store, whose lease lasts much shorter than an upload."""
    monkeypatch.setattr(mirrors, "RENEW_EVERY_S", 0.02)
    monkeypatch.setattr(owner, "_EXPIRY_S", 0.5)
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: threading.Event().wait(0.02))
    folder = tmp_path / "sweep"
    folder.mkdir()
    for name in ("a.yaml", "b.yaml"):
        (folder / name).write_text("ours")
    store = SlowStore(f"file://{tmp_path}/store/sweep")
    made = FolderSync(folder, store)
    made.connect()
    yield made, store
    store.may_end.set()


def run_in_thread(function, **arguments):
    thread = threading.Thread(target=function, kwargs=arguments)
    thread.start()
    return thread


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_slow_upload_does_not_make_the_lease_expire(slow, at_the_end):
    folder_sync, store = slow
    if at_the_end:
        thread = run_in_thread(folder_sync.finish, timeout_s=0.0)
    else:
        folder_sync._every_s = 0.01
        folder_sync.start()
    assert store.has_begun.wait(30)
    with pytest.raises(UserError, match="is already running as process"):
        Lease(ObjectStore(store.url)).acquire()
    store.may_end.set()
    if at_the_end:
        thread.join()
    else:
        folder_sync.finish(timeout_s=0.0)
    assert set(store.list_files()) == {"a.yaml", "b.yaml"}


def test_a_process_that_has_lost_the_sweep_overwrites_nothing(slow, tmp_path, monkeypatch, capsys):
    folder_sync, store = slow
    monkeypatch.setattr(mirrors, "_NUM_THREADS", 1)
    thread = run_in_thread(folder_sync.finish, timeout_s=0.0)
    assert store.has_begun.wait(30)
    other = ObjectStore(store.url)
    theirs = json.dumps({"id": "other", "host": "elsewhere", "pid": 7, "beat": 1}).encode()
    other.write(LEASE_FILE, theirs)
    while not folder_sync.has_lost_lease:
        other.write(LEASE_FILE, theirs)
    store.may_end.set()
    thread.join()
    assert len(set(other.list_files()) & {"a.yaml", "b.yaml"}) == 1  # the one that was being copied
    assert json.loads(other.read(LEASE_FILE))["id"] == "other"
    assert capsys.readouterr().err.count("so this process stops") == 1


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(simulate, monkeypatch):
    swept = start_sweep(simulate)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    store = ObjectStore(swept.settings.storage_url)
    store.write(LEASE_FILE, json.dumps({"id": "x", "host": socket.gethostname(), "pid": gone.pid, "beat": 1}).encode())
    monkeypatch.setattr(owner.time, "sleep", pytest.fail)
    FolderSync(swept.settings.path, store).connect()


def test_a_name_that_is_taken_in_the_store_is_a_sentence(simulate, tmp_path):
    swept = start_sweep(simulate)
    swept.mirror.sync_changes()
    with pytest.raises(UserError, match=r"file://.*/store/sweep already has a sweep"):
        check_storage(swept.settings)
    check_storage(make_settings(tmp_path / "b", name="other", storage=swept.settings.storage))
    with pytest.raises(UserError, match=r"sweep.storage=/shared is not a URL"):
        check_storage(make_settings(tmp_path / "b", storage="/shared"))


def test_where_there_is_no_sweep_nothing_is_brought_back(tmp_path):
    url = f"file://{tmp_path}/store/none"
    with pytest.raises(UserError, match=rf"sweep.resume={url}: there is no sweep.yaml in it"):
        download_sweep(url, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_in_a_store_is_looked_at_without_its_checkpoints(simulate, capsys):
    swept = start_sweep(simulate)
    write_sweep(swept.settings)
    swept.mirror.sync_all()
    print_status(swept.settings.storage_url)
    assert f"python tune.py sweep.resume={swept.settings.storage_url}" in capsys.readouterr().out
    with open_sweep_for_reading(swept.settings.storage_url) as folder:
        assert (folder / "events.jsonl").read_bytes() == swept.file.read_bytes()
        assert {each.name for each in folder.iterdir()} == {"events.jsonl", "sweep.yaml"}
    assert not folder.exists()


@pytest.mark.slow
def test_a_sweep_with_workers_is_whole_in_its_store(ray_started, tmp_path, write_space, capsys):
    """The folder is lost before the last trials are asked for, and the study with it."""
    space = write_space(SPACE)
    storage = f"file://{tmp_path}/store"

    def run_on(folder, num_trials, *, resume):
        settings = make_settings(tmp_path / folder, num_trials=num_trials, storage=storage)
        with sync_sweep_folder(settings) as folder_sync:
            return run_small_sweep(
                settings, space, grows_in_a_store, resume=resume, folder_sync=folder_sync, scheduler=make_asha(4)
            )

    before = run_on("here", 3, resume=False)
    shutil.rmtree(tmp_path / "here")
    table = run_on("there", 6, resume=True)
    store = ObjectStore(f"{storage}/test")
    assert len(table.rows) == 6
    assert all(table.rows[number] == row for number, row in before.rows.items())
    for row in table.rows.values():
        grown = row.epochs * row.params["optimizer.lr"] / row.params["model.decoder.depth"]
        assert row.metrics[METRIC] == pytest.approx(10.0 - grown)
    resumed = [event for event in read_events(tmp_path / "there" / "events.jsonl") if isinstance(event, EpochReported)]
    assert {event.resumed_from for event in resumed if event.trial == 1 and event.epoch > 2} <= {2}
    assert {"trials.csv", "study/journal.log", "sweep.yaml"} <= set(store.list_files())
    assert not list((tmp_path / "there").glob("checkpoints/*/*"))


@pytest.mark.slow
def test_the_study_is_made_again_from_the_events(ray_started, tmp_path, write_space):
    """It is in the store as it was at some time before, or not at all."""
    space, studies = write_space(SPACE), []
    for name in ("whole", "rebuilt"):
        settings = make_settings(tmp_path / name, num_trials=6, max_concurrent=1)
        run_small_sweep(settings, space, curve, sampler=make_tpe())
        if name == "rebuilt":
            shutil.rmtree(tmp_path / name / "study")
        run_small_sweep(replace(settings, num_trials=9), space, curve, sampler=make_tpe(), resume=True)
        study = optuna.load_study(study_name="test", storage=open_storage_for_reading(None, tmp_path / name / "study"))
        studies.append([(trial.params, trial.state, trial.intermediate_values) for trial in study.trials])
    assert studies[0] == studies[1]
