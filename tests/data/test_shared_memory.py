"""A small /dev/shm: refused before work starts, and never waited for."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from handpose.config_files import REPOSITORY
from handpose.data import datamodule, shared_memory
from handpose.data.datamodule import HandDataModule
from handpose.data.freihand import FreiHand
from handpose.data.shared_memory import check_shared_memory, compute_batch_bytes
from handpose.errors import UserError
from tests.builders import write_freihand


@pytest.fixture
def free_mb(monkeypatch):
    """Makes /dev/shm have so many MB free."""

    def set_free(size_mb):
        usage = SimpleNamespace(total=64e6, used=0, free=int(1e6 * size_mb))
        monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: usage)

    return set_free


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_freihand(tmp_path_factory.mktemp("set"), num_poses=16, variants=1, num_test=4, masks=True)


def make_data(root, **options):
    source = FreiHand(str(root), val_fraction=0.25, split="blocks", num_blocks=2, split_seed=0)
    given = {"image_size": None, "batch_size": 4, "pack_folder": str(root.parent / "packed"), "seed": 0}
    return HandDataModule(source, progress=False, **given | options)


@pytest.mark.parametrize("masks", [False, True])
def test_the_bytes_of_a_batch_are_those_of_its_tensors_in_whole_pages(root, masks):
    batch = next(iter(make_data(root, masks=masks).train_dataloader()))
    pages = sum(-(-tensor.untyped_storage().nbytes() // 4096) for tensor in batch)
    predicted = compute_batch_bytes(batch_size=4, image_size=32, masks=masks) / 4096
    assert abs(predicted - pages) <= 1  # pictures and masks are two tensors


def test_loaders_that_do_not_fit_are_refused_with_figures_and_a_remedy(free_mb):
    free_mb(64)
    check_shared_memory(num_workers=3, bytes_per_batch=10_000_000)
    check_shared_memory(num_workers=0, bytes_per_batch=10**12)
    with pytest.raises(UserError) as refused:
        check_shared_memory(num_workers=4, bytes_per_batch=10_000_000)
    assert "data.num_workers=4 needs 80 MB of shared memory (4 workers x 2 batches of 10 MB)" in str(refused.value)
    assert "/dev/shm has 64 MB free; give data.num_workers=3, a smaller data.batch_size" in str(refused.value)
    with pytest.raises(UserError, match=r"\(4 trials at a time x 1 workers x 2 batches of 10 MB\)"):
        check_shared_memory(num_workers=1, bytes_per_batch=10_000_000, num_processes=4, processes="trials at a time")


def test_the_check_knows_the_data_and_how_many_processes_share_the_memory(root, free_mb):
    data = make_data(root, num_workers=2)
    needed_mb = 2 * 2 * compute_batch_bytes(batch_size=4, image_size=32, masks=False) / 1e6
    free_mb(1.01 * needed_mb)
    data.check_shared_memory()
    with pytest.raises(UserError, match=r"data\.num_workers=2 needs"):
        data.check_shared_memory(num_processes=2)
    make_data(root, num_workers=0).check_shared_memory(num_processes=1000)


class Stuck(torch.utils.data.Dataset):
    """Whose batches never come."""

    def __getitem__(self, index):
        time.sleep(1000)

    def __len__(self):
        return 4


class Killed(Stuck):
    """Whose process is ended by the system."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("dataset", "reason"), [(Stuck(), "timed out"), (Killed(), "killed by signal|exited unexpectedly")]
)
def test_a_loader_whose_processes_give_no_batch_ends_with_a_sentence(root, monkeypatch, dataset, reason):
    monkeypatch.setattr(datamodule, "_BATCH_TIMEOUT_S", 1.0)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # how long a stuck process is joined
    data = make_data(root, num_workers=1)
    loader = data._make_loader(dataset, [0, 1])
    with pytest.raises(
        UserError, match=rf"^data\.num_workers=1: .*({reason}).*/dev/shm has .* MB of .* give data\.num"
    ):
        next(iter(loader))


# --- with a small tmpfs -----------------------------------------------------------------------------------------------

TRAINING = (
    *("data=freihand", "data.image_size=64", "data.batch_size=8", "data.source.num_blocks=2", "num_threads=1"),
    *(
        "data.source.val_fraction=0.25",
        "data.num_workers=2",
        "model.encoder.name=test_efficientnet",
        "model.decoder.depth=2",
    ),
    *("model.encoder.pretrained=false", "trainer.accelerator=cpu", "trainer.max_epochs=1", "logger=none"),
)
_UNCHECKED = """
import sys
from handpose.data.datamodule import HandDataModule
HandDataModule.check_shared_memory = lambda data, **given: None
sys.argv = sys.argv[1:]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


def limit_shared_memory(command, folder, size_kb):
    """The command line that runs a command with a small /dev/shm of its own, and its settings for subprocess."""
    mounted = f'mount -t tmpfs -o size={size_kb}k tmpfs /dev/shm && exec "$@"'
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    how = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return ["unshare", "--mount", "sh", "-c", mounted, "sh", *command], how


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with a data set."""
    command, how = limit_shared_memory(["true"], "/", 100)
    if shutil.which("unshare") is None or subprocess.run(command, **how).returncode:
        pytest.skip("no tmpfs can be mounted here")
    folder = tmp_path_factory.mktemp("user")
    write_freihand(folder / "freihand", num_poses=24, variants=1, num_test=6, size=64)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "more", "trials"),
    [("train.py", [], ""), ("tune.py", ["ray.num_cpus=2", "sweep.gpus_per_trial=0"], "2 trials at a time x ")],
)
def test_a_run_that_does_not_fit_into_shared_memory_is_refused_before_work_starts(user, script, more, trials):
    command = [sys.executable, str(REPOSITORY / script), *TRAINING, "data.root=freihand", "paths.output=out", *more]
    command, how = limit_shared_memory(command, user, 600 if more else 300)  # a trial alone would fit into 600 kB
    done = subprocess.run(command, **how, timeout=200)
    assert done.returncode == 2, done.stderr
    told = rf"^error: data\.num_workers=2 needs .* MB of shared memory \({trials}2 workers x 2 batches of 0\.1"
    assert re.search(told, done.stderr, re.MULTILINE), done.stderr
    assert {path.name for path in (user / "out").glob("*")} <= {"packed"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_waits_for_a_batch_is_ended_by_a_signal(user, number):
    command = [sys.executable, "-c", _UNCHECKED, str(REPOSITORY / "train.py"), *TRAINING, "data.root=freihand"]
    command, how = limit_shared_memory(command, user, 100)
    with subprocess.Popen(command, **how) as process:
        try:
            assert any("unable to allocate shared memory" in line for line in process.stderr)
            time.sleep(1.0)
            assert process.poll() is None
            process.send_signal(number)
            told = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130, told
    assert told.splitlines()[-1].startswith("interrupted")
