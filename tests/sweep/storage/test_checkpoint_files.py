"""Checkpoints in a store: kept, fetched, taken over, and what becomes of them while it does not answer."""

from dataclasses import replace

import pytest

from handpose.errors import UserError
from handpose.sweep.record.trial_segment import TrialSegment
from handpose.sweep.storage import checkpoint_files
from handpose.sweep.storage.checkpoint_files import FolderFiles, StoreFiles, open_worker_files
from handpose.sweep.storage.object_store import ObjectStore
from handpose.sweep.storage.retention import describe_checkpoint


class UnreliableStore(ObjectStore):
    """A store that does not answer while it is out."""

    is_out = False
    num_refused = 0

    def _get_path(self, name):
        if self.is_out:
            self.num_refused += 1
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7 (Request ID: 123)")
        return super()._get_path(name)


@pytest.fixture
def store(tmp_path):
    return UnreliableStore(f"file://{tmp_path}/store")


@pytest.fixture(params=["folder", "store"])
def files(request, store, tmp_path):
    return FolderFiles(tmp_path) if request.param == "folder" else StoreFiles(store, tmp_path)


@pytest.fixture
def store_files(store, tmp_path):
    return StoreFiles(store, tmp_path)


def commit_checkpoint(files, epoch, *, segment=1, is_needed=False, content=b"weights"):
    name = TrialSegment(3, segment, {}, 0, [], "", None).make_checkpoint_name(epoch)
    file = files.get_local_path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content + bytes(str(epoch), "ascii"))
    return files.commit(file, epoch=epoch, is_needed=is_needed)


def test_a_node_that_does_not_see_the_sweeps_folder_says_so_before_it_trains(tmp_path, monkeypatch):
    segment = TrialSegment(3, 1, {}, 0, [], str(tmp_path / "sweep"), None)
    monkeypatch.setattr(checkpoint_files.explain_unshared_folder, "__kwdefaults__", {"timeout_s": 0.0})
    with pytest.raises(FileNotFoundError, match=r"cannot access .*/sweep, the folder of the sweep: keep it in"):
        open_worker_files(segment, scratch=tmp_path).__enter__()
    (tmp_path / "sweep").mkdir()
    with pytest.raises(FileNotFoundError, match="cannot access"):
        open_worker_files(segment, scratch=tmp_path).__enter__()
    (tmp_path / "sweep" / "events.jsonl").touch()
    with open_worker_files(segment, scratch=tmp_path) as files:
        assert files.get_local_path("a") == tmp_path / "sweep" / "a"
    assert not list(tmp_path.glob("sweep/checkpoints"))


def test_the_newest_that_is_whole_is_fetched(files, store, tmp_path):
    kept = [commit_checkpoint(files, epoch) for epoch in (1, 2, 3)]
    newest, file = files.fetch_newest(kept)
    assert (newest, file.read_bytes()) == (kept[2], b"weights3")
    for place in (tmp_path / "store", tmp_path):
        if (place / kept[2].file).is_file():
            (place / kept[2].file).write_bytes(b"weightsX")
    files.remove(kept[1].file)
    getattr(files, "remove_now", lambda name: None)(kept[1].file)
    newest, file = files.fetch_newest(kept)
    assert (newest, file.read_bytes()) == (kept[0], b"weights1")
    assert files.fetch_newest([]) is None


def test_what_a_stretch_left_untold_is_found_by_its_name(files):
    kept = [commit_checkpoint(files, epoch, segment=2) for epoch in (4, 5, 6)]
    commit_checkpoint(files, 5, segment=1)
    assert files.find_unreported(3, 2, range(5, 7)) == kept[1:]
    assert files.find_unreported(3, 3, range(1, 9)) == files.find_unreported(4, 2, range(1, 9)) == []


def test_a_stored_checkpoint_that_is_about_to_be_removed_is_not_found_as_unreported(store_files):
    kept = commit_checkpoint(store_files, 5)
    assert store_files.find_unreported(3, 1, range(1, 9)) == [kept]
    store_files.remove(kept.file)
    assert store_files.find_unreported(3, 1, range(1, 9)) == []


def test_what_an_earlier_version_left_unreported_is_found_too(tmp_path):
    files = FolderFiles(tmp_path)
    name = "checkpoints/trial_0003/epoch_0004_stretch_2.ckpt"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"weights")
    kept = [files.commit(tmp_path / name, epoch=4, is_needed=False), commit_checkpoint(files, 5, segment=2)]
    assert files.find_unreported(3, 2, range(1, 9)) == kept


def test_what_an_earlier_version_left_unreported_in_a_store_is_found_too(store_files, store, tmp_path):
    (tmp_path / "file").write_bytes(b"weights")
    store.upload(tmp_path / "file", "checkpoints/trial_0003/epoch_0004_stretch_2.0000002a.ckpt")
    (found,) = store_files.find_unreported(3, 2, range(1, 9))
    assert (found.epoch, found.checksum) == (4, 42)


@pytest.mark.parametrize("name", ["../victim", "checkpoints/../../victim", "/victim"])
def test_no_checkpoint_is_outside_the_sweep(files, tmp_path, name):
    """A record comes from the events of a sweep that someone else may have written."""
    inside = tmp_path / "inside"
    name = str(tmp_path / "victim") if name == "/victim" else name
    files = FolderFiles(inside) if isinstance(files, FolderFiles) else StoreFiles(files._store, inside)
    (tmp_path / "victim").write_bytes(b"kept")
    record = describe_checkpoint(tmp_path / "victim", folder=tmp_path, epoch=1)
    outside = replace(record, file=name)
    for operation in (
        lambda: files.get_local_path(name),
        lambda: files.fetch_newest([outside]),
        lambda: files.copy_newest([outside], "checkpoints/copy.ckpt"),
        lambda: files.discard(outside),
        lambda: getattr(files, "remove_now", files.remove)(name),
        lambda: files.clear({name}),
    ):
        with pytest.raises(UserError, match=r"victim'.*(names must not be absolute|leads out of the folder)"):
            operation()
    assert (tmp_path / "victim").read_bytes() == b"kept"
    assert not (inside / "checkpoints").exists()


def test_a_checkpoint_is_taken_over_under_a_name_of_its_own(files):
    kept = [commit_checkpoint(files, 1), commit_checkpoint(files, 2)]
    taken = files.copy_newest(kept, "checkpoints/trial_0007/segment_1_of_3.ckpt")
    assert (taken.file, taken.epoch) == ("checkpoints/trial_0007/segment_1_of_3.ckpt", 2)
    assert files.fetch_newest([taken])[1].read_bytes() == b"weights2"
    assert files.list_names() == {each.file for each in (*kept, taken)}


def test_a_worker_leaves_nothing_on_its_node(store, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with open_worker_files(TrialSegment(3, 1, {}, 0, [], "", None, store.url), scratch=scratch) as files:
        kept = commit_checkpoint(files, 1)
        assert files.fetch_newest([kept])[1].is_relative_to(scratch)
    assert list(scratch.iterdir()) == []
    assert set(store.list_files()) == {kept.file}


def test_without_a_store_a_checkpoint_is_left_out_with_a_note_and_asked_for_later_again(
    store_files, store, monkeypatch
):
    now = [100.0]
    monkeypatch.setattr(checkpoint_files.time, "monotonic", lambda: now[0])
    store.is_out = True
    with pytest.raises(UserError, match=r"cannot be kept in file://.*\(AWS Error NETWORK_CONNECTION .*: 7\)$"):
        commit_checkpoint(store_files, 1)
    asked = store.num_refused
    with pytest.raises(UserError, match="cannot be kept"):
        commit_checkpoint(store_files, 2)
    assert store.num_refused == asked  # too soon
    now[0] += 60.0
    with pytest.raises(UserError, match="cannot be kept"):
        commit_checkpoint(store_files, 3)
    assert store.num_refused > asked
    store.is_out = False
    now[0] += 60.0
    assert store_files.fetch_newest([commit_checkpoint(store_files, 4)])[0].epoch == 4


def test_a_checkpoint_that_a_trial_pauses_with_and_one_to_go_on_from_are_waited_for(store_files, store, monkeypatch):
    def sleep(seconds):
        slept.append(seconds)
        store.is_out = len(slept) % 3 != 0

    slept = []
    monkeypatch.setattr(checkpoint_files.time, "sleep", sleep)
    store.is_out = True
    kept = commit_checkpoint(store_files, 1, is_needed=True)
    assert slept == [2.0, 4.0, 8.0]
    store.is_out = True
    assert store_files.fetch_newest([kept])[0] == kept
    assert slept == [2.0, 4.0, 8.0] * 2


def test_the_driver_removes_nothing_until_the_store_knows_why(store_files, store):
    kept = commit_checkpoint(store_files, 1)
    store_files.remove(kept.file)
    assert set(store.list_files()) == {kept.file}
    assert list(store_files.obsolete) == [kept.file]
