"""A job from its nodes to its end: what makes it come again, and what does not."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest

from cluster import job, sweep
from cluster.job import RayNodes, parse_arguments, run_job
from cluster.sweep import make_tune_command, measure_progress, run_without_retry
from handpose.config_files import REPOSITORY
from tests.builders import write_freihand
from tests.sweep.trainable.test_trial import SMALL


class FakeNodes:
    """Nodes that are up at once."""

    has_head = True
    num_hosts = 4

    def __init__(self, missing=()):
        self.told, self.missing = [], missing

    def start_head(self, ending, patience_s):
        return "127.0.0.1:1"

    def start_others(self, address, ending, patience_s, *, min_nodes):
        self.told.append(address)
        return self.missing

    def report_ended_nodes(self):
        pass

    def restart_ended_nodes(self, address):
        pass

    def stop(self):
        self.told.append("stopped")


class FakeEnding:
    """A job that is warned after so many looks."""

    def __init__(self, looks=10**9):
        self.looks = looks
        self.is_warned = False

    @property
    def is_due(self):
        self.looks -= 1
        self.is_warned = self.looks < 0
        return self.is_warned


class FakeAllocation:
    """One that takes note."""

    job, hosts = "7", ("here", "there")

    def __init__(self, reason=None):
        self.reason, self.num_asked = reason, 0

    def command_on(self, host, command):
        return command

    def requeue(self):
        self.num_asked += 1
        return self.reason


@pytest.fixture
def tune(monkeypatch):
    """Puts a piece of Python in the place of tune.py."""
    monkeypatch.setattr(job, "_POLL_INTERVAL_S", 0.05)
    return lambda code: monkeypatch.setattr(job, "make_tune_command", lambda *given: [sys.executable, "-c", code])


def make_options(**changes):
    return Namespace(**{"wait_s": 1, "warning_s": 10, "min_nodes": 2, "wrap": "", **changes})


SAVES = "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(75)); print('up', flush=True); time.sleep(60)"


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_a_sweep_that_ends_by_itself_says_how(tune, tmp_path, status):
    nodes = FakeNodes()
    tune(f"raise SystemExit({status})")
    assert run_job(nodes, FakeEnding(), make_options(), [], tmp_path) == status
    assert nodes.told == ["127.0.0.1:1", "stopped"]


def test_a_warning_makes_the_sweep_save_before_the_nodes_are_stopped(tune, tmp_path):
    tune(SAVES)
    assert run_job(FakeNodes(), FakeEnding(looks=20), make_options(), [], tmp_path) == 75


def test_a_sweep_that_does_not_end_in_time_is_killed_and_can_go_on(tune, tmp_path):
    tune("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
    began = time.monotonic()
    assert run_job(FakeNodes(), FakeEnding(looks=20), make_options(warning_s=1), [], tmp_path) == 75
    assert time.monotonic() - began < 30


def test_a_job_with_too_few_nodes_fails_and_does_not_crawl(tune, tmp_path, capsys):
    tune("raise SystemExit(7)")
    nodes = FakeNodes(missing=["a02", "a03", "a04"])
    assert run_job(nodes, FakeEnding(), make_options(), [], tmp_path) == 1
    assert nodes.told[-1] == "stopped"
    told = capsys.readouterr().out
    assert "only 1 of 4 nodes have joined after 1 s, fewer than --min-nodes 2" in told
    assert "missing: a02, a03, a04" in told


def test_a_job_with_enough_nodes_goes_on_without_the_others(tune, tmp_path, capsys):
    tune("raise SystemExit(7)")
    assert run_job(FakeNodes(missing=["a03", "a04"]), FakeEnding(), make_options(), [], tmp_path) == 7
    assert "continues with 2 nodes; not available yet: a03, a04" in capsys.readouterr().out


def test_the_driver_and_the_nodes_run_in_a_container(tune, tmp_path, monkeypatch):
    """Their Python is the one of the image."""
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    wrapper.chmod(0o755)
    tune("raise SystemExit(7)")
    options = make_options(wrap=f"{wrapper} exec --nv 'my image.sif'")
    assert run_job(FakeNodes(), FakeEnding(), options, [], tmp_path) == 0
    nodes = RayNodes(FakeAllocation(), tmp_path, [], wrap=[str(wrapper), "exec", "image"])
    assert nodes.start_head(FakeEnding(), 10) is None
    nodes.stop()
    driver, head = (tmp_path / "calls").read_text().splitlines()
    assert driver == "exec --nv my image.sif python -c raise SystemExit(7)"
    assert re.match(r"exec image python .*/node\.py --folder=.* --host=here", head)


def test_a_sweep_without_a_head_is_told_to_save(tune, tmp_path):
    tune(SAVES)
    nodes = FakeNodes()
    nodes.has_head = False
    assert run_job(nodes, FakeEnding(), make_options(), [], tmp_path) == 75


NODE = """
import pathlib, sys, time
given = dict(item.removeprefix("--").split("=", 1) for item in sys.argv[1:])
folder, host = pathlib.Path(given["folder"]), given["host"]
with (folder / "starts").open("a") as starts:
    print(host, given.get("head"), file=starts)
(folder / f"{host}.up").write_text("10.0.0.1:7")
if host == "here":
    time.sleep(600)
with (folder / f"{host}.log").open("a") as log:
    print(*[f"line {number}" for number in range(50)], "out of memory", sep="\\n", file=log)
sys.exit(3)
"""


FAILS = """
import pathlib, sys, time
given = dict(item.removeprefix("--").split("=", 1) for item in sys.argv[1:])
folder, host = pathlib.Path(given["folder"]), given["host"]
with (folder / "starts").open("a") as starts:
    print(host, file=starts)
num_starts = (folder / "starts").read_text().splitlines().count(host)
if host == "here" or num_starts >= int((folder / "works_after").read_text()):
    (folder / f"{host}.up").write_text("10.0.0.1:7")
    time.sleep(600)
"""


@pytest.mark.parametrize(("min_nodes", "works_after", "missing"), [(2, 3, []), (1, 3, ["there"]), (2, 99, ["there"])])
def test_nodes_that_fail_at_the_start_are_started_again_while_there_are_too_few(
    tmp_path, monkeypatch, min_nodes, works_after, missing
):
    (tmp_path / "node.py").write_text(FAILS)
    (tmp_path / "works_after").write_text(str(works_after))
    monkeypatch.setattr(job, "_NODE_SCRIPT", tmp_path / "node.py")
    monkeypatch.setattr(job, "_POLL_INTERVAL_S", 0.02)
    monkeypatch.setattr(job, "_RESTART_AFTER_S", 0.02)
    nodes = RayNodes(FakeAllocation(), tmp_path, [])
    try:
        address = nodes.start_head(FakeEnding(), 30)
        timeout_s = 1.0 if works_after == 99 else 30
        assert nodes.start_others(address, FakeEnding(), timeout_s, min_nodes=min_nodes) == missing
    finally:
        nodes.stop()


def test_a_node_that_ended_is_started_again_a_few_times(tmp_path, monkeypatch, capsys):
    (tmp_path / "node.py").write_text(NODE)
    monkeypatch.setattr(job, "_NODE_SCRIPT", tmp_path / "node.py")
    monkeypatch.setattr(job, "_RESTART_AFTER_S", 0.05)
    nodes = RayNodes(FakeAllocation(), tmp_path, [])
    try:
        address = nodes.start_head(FakeEnding(), 60)
        nodes.start_others(address, FakeEnding(), 60)
        end = time.monotonic() + 60
        told = ""
        while "job:   there: out of memory" not in told:
            nodes.report_ended_nodes()
            told += capsys.readouterr().out
            assert time.monotonic() < end
        assert f"the Ray node on there has ended with status 3; the end of its log {tmp_path}/there.log:" in told
        assert told.count("job:   there: line") == job._NUM_LOG_LINES - 1
        while (tmp_path / "starts").read_text().count("there") < job._MAX_STARTS:
            nodes.report_ended_nodes()
            nodes.restart_ended_nodes(address)
            time.sleep(0.02)
            assert time.monotonic() < end
        for _ in range(20):  # and no more
            nodes.report_ended_nodes()
            nodes.restart_ended_nodes(address)
            time.sleep(0.02)
        assert nodes.has_head
    finally:
        nodes.stop()
    starts = (tmp_path / "starts").read_text().splitlines()
    assert starts == ["here None", *["there 10.0.0.1:7"] * job._MAX_STARTS]
    assert "job: restarting the Ray node on there" in capsys.readouterr().out


def test_a_job_that_got_somewhere_comes_again(tmp_path, capsys):
    allocation = FakeAllocation()
    for _ in range(3):
        assert job._requeue(allocation, tmp_path, has_moved=True, folder=Path("sweep")) == 75
    assert allocation.num_asked == 3


def test_jobs_that_get_nowhere_do_not_come_again_for_ever(tmp_path, capsys):
    allocation = FakeAllocation()
    statuses = [job._requeue(allocation, tmp_path, has_moved=False, folder=Path("sweep")) for _ in range(2)]
    assert (statuses, allocation.num_asked) == ([75, 1], 1)
    assert "2 jobs in a row finished no epoch" in capsys.readouterr().out


def test_a_job_that_cannot_come_again_says_how_to_go_on(tmp_path, capsys):
    assert job._requeue(FakeAllocation("no rights"), tmp_path, has_moved=True, folder=Path("/sweep")) == 75
    told = capsys.readouterr().out
    assert "could not be queued again (no rights); to resume: python tune.py sweep.resume=/sweep" in told


def test_a_warning_reaches_neither_what_the_job_starts_nor_is_it_lost():
    code = f"""
import os, signal, subprocess, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from cluster.job import JobEnd
ending = JobEnd()
child = subprocess.Popen(["sleep", "30"])
assert not ending.is_due
os.kill(child.pid, signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGUSR1)
assert ending.is_warned and ending.is_due and child.poll() is None
child.terminate()
assert child.wait() == -15
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_next_job_goes_on_with_what_the_first_began(tmp_path):
    arguments = ["sweep.name=hands", "sweep.num_trials=7"]
    assert make_tune_command(arguments, tmp_path)[2:] == [*arguments, "ray.address=auto"]
    (tmp_path / "sweep.yaml").write_text("")
    assert make_tune_command(arguments, tmp_path)[2:] == [f"sweep.resume={tmp_path}", "ray.address=auto"]
    resumed = [f"sweep.resume={tmp_path}", "sweep.num_trials=9"]
    assert make_tune_command(resumed, tmp_path)[2:] == [*resumed, "ray.address=auto"]


def test_a_job_whose_folder_is_gone_goes_on_from_the_store(tmp_path):
    """As on a new head of a cluster whose machines have disks of their own."""
    arguments = ["sweep.name=hands", f"sweep.storage=file://{tmp_path}/store", "paths.data=/data", "sweep.num_trials=7"]
    assert make_tune_command(arguments, tmp_path / "gone")[2:] == [*arguments, "ray.address=auto"]
    (tmp_path / "store" / "hands").mkdir(parents=True)
    (tmp_path / "store" / "hands" / "owner.json").touch()  # nothing has been begun yet
    assert make_tune_command(arguments, tmp_path / "gone")[2:] == [*arguments, "ray.address=auto"]
    (tmp_path / "store" / "hands" / "sweep.yaml").touch()
    resumed, *more = make_tune_command(arguments, tmp_path / "gone")[2:]
    assert resumed.partition("=")[2].strip("'") == f"file://{tmp_path}/store/hands"
    assert more == ["paths.data=/data", "ray.address=auto"]


def test_progress_grows_with_the_epochs_and_not_with_attempts(tmp_path):
    before = measure_progress(tmp_path)
    (tmp_path / "events.jsonl").write_text('{"event": "opened", "at": 0}\n{"event": "begun", "at": 1}\n')
    assert measure_progress(tmp_path) == before
    with (tmp_path / "events.jsonl").open("a") as log:
        log.write('{"event": "reported", "at": 2}\n')
    assert measure_progress(tmp_path) > before


def test_the_arguments_of_the_sweep_follow_two_dashes():
    given, arguments = parse_arguments(["--folder=/x", "--warning-s=60", "--gpus=0", "--", "sweep.name=a", "--"])
    assert (given.folder, given.gpus, given.cpus, arguments) == (Path("/x"), 0, None, ["sweep.name=a", "--"])


@pytest.mark.slow
def test_a_sweep_on_two_nodes_is_warned_and_goes_on_in_the_next_job(tmp_path):
    """Under LSF, as its environment and `blaunch` would have it; both hosts are this machine."""
    write_freihand(tmp_path / "freihand", num_poses=24, variants=1, num_test=6, size=64)
    blaunch = tmp_path / "bin" / "blaunch"
    blaunch.parent.mkdir()
    blaunch.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    blaunch.chmod(0o755)
    environment = os.environ | {"PATH": f"{blaunch.parent}:{os.environ['PATH']}", "LSB_JOBID": "12"}
    environment |= {"LSB_MCPU_HOSTS": "first 1 second 1", "LSB_DJOB_RANKFILE": "/dev/null", "DIR_SCRATCH": "outputs"}
    place = tmp_path / "job"
    overrides = [*SMALL, "data.root=freihand", "sweep.name=two", "sweep.num_trials=4", "sweep.max_epochs=6"]
    overrides += ["trainer.max_epochs=1", "trainer.accelerator=cpu", "sweep.gpus_per_trial=0", "scheduler=fifo"]
    overrides += ["sweep.preflight=off", "sweep.confirm.seeds=0"]
    command = [sys.executable, str(REPOSITORY / "cluster" / "job.py"), f"--folder={place}", "--warning-s=120"]
    command += ["--cpus=1", "--gpus=0", "--", *overrides]
    log = tmp_path / "log"
    sweep = tmp_path / "outputs" / "sweeps" / "two"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        while measure_progress(sweep) == 0:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        assert len({file.stem for file in (place / "nodes_12").glob("*.up")}) == 2
        process.send_signal(signal.SIGUSR1)
        assert process.wait(200) == 75, log.read_text()
        assert "job: queued again" in log.read_text()
        assert not (place / "nodes_12" / "token").exists()
        assert subprocess.run(command, cwd=tmp_path, env=environment, stdout=out, stderr=out).returncode == 0
    assert (sweep / "retrain" / "metrics.json").is_file()
    assert "·  resumed" in log.read_text()


@pytest.mark.parametrize(("variables", "num_threads"), [({"SWEEP_ARGUMENTS": '["sweep.name=a"]'}, None), ({}, "1")])
def test_a_job_that_ray_starts_does_not_keep_rays_number_of_threads(monkeypatch, tmp_path, variables, num_threads):
    for name, value in {"OMP_NUM_THREADS": "1", "DIR_SCRATCH": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(sweep.os, "execv", lambda *_: started.append(os.environ.get("OMP_NUM_THREADS")))
    monkeypatch.setattr(sys, "argv", ["sweep.py", *([] if variables else ["--", "sweep.name=a"])])
    sweep.main()
    assert started == [num_threads]


@pytest.mark.parametrize(("status", "returned"), [(0, 0), (1, 1), (2, 0), (75, 75)])
def test_a_mistake_of_the_user_is_not_tried_again(capfd, status, returned):
    """KubeRay would start as many clusters as it may, each of which ends with the same error."""
    assert run_without_retry([sys.executable, "-c", f"raise SystemExit({status})"]) == returned
    assert ("would end with the same error" in capfd.readouterr().err) == (status == 2)


def test_a_job_of_kuberay_that_is_told_to_end_passes_it_on(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def end_when_up():
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    code = SAVES.replace("print('up', flush=True)", f"open({str(tmp_path / 'up')!r}, 'w').close()")
    thread = threading.Thread(target=end_when_up)
    thread.start()
    assert run_without_retry([sys.executable, "-c", code]) == 75
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
