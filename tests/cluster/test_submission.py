"""What the launchers write for a scheduler, and the mistakes that they find before anything is submitted."""

import re
import shlex
import stat
import subprocess
from datetime import datetime

import pytest

from cluster import lsf, slurm
from cluster.submission import REPOSITORY, make_job_parser, parse_wall_time, read_submission

JOB = ["--nodes", "4", "--gpus-per-node", "2", "--wall-time", "04:00:00"]
SWEEP = ["sweep.name=hands", "sweep.num_trials=7"]


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIR_SCRATCH", raising=False)
    return tmp_path


def run_dry(launcher, capsys, *argv):
    launcher.main([*argv])
    return capsys.readouterr().out.splitlines()


def run_refused(launcher, capsys, *argv):
    """The sentence that the launcher ends with."""
    with pytest.raises(SystemExit) as left:
        launcher.main([*argv])
    assert left.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    return told.err


def test_a_slurm_job_is_warned_before_its_end_and_comes_again(working_folder, capsys):
    lines = run_dry(slurm, capsys, *JOB, "--dry-run", "--partition", "gpu", "--account=me", "--", *SWEEP)
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--nodes=4", "--gpus-per-node=2", "--time=04:00:00", "--signal=B:USR1@300", "--requeue"} <= asked
    assert {"--partition gpu", "--account=me", "--exclusive", "--open-mode=append"} <= asked
    assert lines[-1].startswith("exec ")
    assert lines[-1].endswith("-- sweep.name=hands sweep.num_trials=7")
    assert list(working_folder.iterdir()) == []


def test_an_lsf_job_counts_slots_and_minutes_and_comes_again_by_its_status(working_folder, capsys):
    argv = [*JOB, "--cpus-per-node", "8", "--warning-s", "200", "-q", "gpu", "-R", "rusage[mem=4]", "--dry-run"]
    lines = run_dry(lsf, capsys, *argv, "--", *SWEEP)
    asked = {line.removeprefix("#BSUB ") for line in lines if line.startswith("#BSUB ")}
    assert {"-n 32", '-R "span[ptile=8]"', "-W 240", "-wa USR1", "-wt 4", '-Q "75"', "-q gpu"} <= asked
    assert "-R 'rusage[mem=4]'" in asked
    assert f"exec >> {working_folder / 'outputs/jobs/hands/job.log'} 2>&1" in lines


def test_the_setup_comes_before_python_and_python_is_its(working_folder, capsys):
    *_, setup, last = run_dry(slurm, capsys, *JOB, "--setup", "module load cuda", "--dry-run", "--", *SWEEP)
    assert setup == "module load cuda"
    assert last.startswith("exec python ")


def test_a_machine_without_gpus_is_asked_for_as_it_is(working_folder, capsys):
    lines = run_dry(slurm, capsys, "--wall-time", "1-00:00:00", "--cpus-per-node", "4", "--dry-run", "--", *SWEEP)
    assert not any("gpus-per-node" in line for line in lines)
    assert "#SBATCH --cpus-per-task=4" in lines
    assert "--gpus=0" in lines[-1]


def test_a_sweep_without_a_name_gets_one_since_the_next_job_finds_it_by_that(working_folder, capsys):
    assert re.search(r"-- sweep\.name=sweep-\d{4}-[-\d]+$", run_dry(slurm, capsys, *JOB, "--dry-run", "--")[-1])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--nodes", "0", "--wall-time", "01:00:00", "--"], r"--nodes must be at least 1, but it is 0"),
        (["--wall-time", "1h", "--"], r"--wall-time 1h must be HH:MM:SS"),
        (["--wall-time", "00:05:00", "--"], r"--warning-s 300 leaves no time"),
        (["--wall-time", "01:00:00", "--time=3", "--"], r"--time=3: --time is set by this launcher"),
        (["--wall-time", "01:00:00", "sweep.name=x"], r"sweep\.name=x is not an option; .* two dashes"),
        (["--wall-time", "01:00:00", "--", "ray.address=auto"], r"ray\.address=auto cannot be set in a job"),
        (["--wall-time", "01:00:00", "--", "sweep.nam=x"], r"no configuration key sweep\.nam"),
        (["--wall-time", "01:00:00", "--", "search_space=none_such"], r"none_such"),
        (
            ["--wall-time", "01:00:00", "--", "sweep.resume=nowhere"],
            r"sweep\.resume=.*nowhere: this folder has no sweep",
        ),
    ],
)
def test_a_mistake_is_a_sentence_before_anything_is_submitted(working_folder, capsys, argv, sentence):
    assert re.search(sentence, run_refused(slurm, capsys, *argv))


def test_a_password_does_not_get_into_a_script(working_folder, capsys):
    told = run_refused(slurm, capsys, *JOB, "--", *SWEEP, "searcher.storage=postgresql://me:hunter2@db/x")
    assert "hunter2" not in told
    assert "searcher.storage='${oc.env:STUDY_URL}'" in told


def test_a_sweep_that_is_there_is_not_begun_again(working_folder, capsys):
    folder = working_folder / "outputs" / "sweeps" / "hands"
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text("")
    assert f"give sweep.resume={folder}" in run_refused(slurm, capsys, *JOB, "--", *SWEEP)
    submission = read_submission(make_job_parser(""), [*JOB, "--", f"sweep.resume={folder}"])
    assert (submission.name, submission.folder) == ("hands", folder)


def test_a_scheduler_that_is_not_there_is_a_sentence(working_folder, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "sbatch is not installed on this machine" in run_refused(slurm, capsys, *JOB, "--", *SWEEP)


def test_the_script_that_is_handed_in_is_kept_for_its_owner_alone(working_folder, capsys, monkeypatch):
    fake = working_folder / "bin" / "bsub"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ncat > {working_folder}/handed_in\necho 'Job <7> is submitted.'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    lines = run_dry(lsf, capsys, *JOB, "--", *SWEEP)
    script = working_folder / "outputs" / "jobs" / "hands" / "job.sh"
    assert (working_folder / "handed_in").read_text() == script.read_text()
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    assert stat.S_IMODE(script.parent.stat().st_mode) == 0o700
    assert "Job <7> is submitted." in lines
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize("launcher", [slurm, lsf])
def test_a_job_runs_in_any_folder(working_folder, capsys, monkeypatch, launcher):
    folder = working_folder / "it's [1] & $HOME 50%"
    folder.mkdir()
    monkeypatch.chdir(folder)
    *lines, command = run_dry(launcher, capsys, *JOB, "--dry-run", "--", *SWEEP)
    assert shlex.split(command)[0] == "exec"
    assert f"--folder={folder}/outputs/jobs/hands" in shlex.split(command)
    assert ["cd", str(folder)] in [shlex.split(line) for line in lines if line.startswith("cd ")]
    log = f"{folder}/outputs/jobs/hands/job.log"
    if launcher is slurm:  # where % begins a pattern
        [output] = [line for line in lines if "--output=" in line]
        assert shlex.split(output, comments=False)[1] == f"--output={log.replace('%', '%%')}"
    else:
        assert ["exec", ">>", log, "2>&1"] in [shlex.split(line) for line in lines if line.startswith("exec >>")]


def test_a_python_that_ray_cannot_start_is_refused_before_a_job_is_submitted(working_folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.executable", "/home/me/it's/.venv/bin/python")
    assert "Ray cannot start /home/me/it's/.venv/bin/python" in run_refused(
        slurm, capsys, *JOB, "--dry-run", "--", *SWEEP
    )


def test_a_wall_time_may_have_days():
    assert [parse_wall_time(text) for text in ("00:01:30", "100:00:00", "2-01:00:00")] == [90, 360000, 176400]


@pytest.mark.parametrize("name", ["slurm", "lsf", "kuberay", "ray_up"])
def test_each_launcher_has_a_guide_of_less_than_a_page(name):
    guide = (REPOSITORY / "docs" / "cluster" / f"{name}.md").read_text(encoding="utf-8")
    assert f"cluster/{name}.py" in guide
    assert len(guide.splitlines()) <= 60


def test_a_deadline_is_submitted_with_its_offset_from_utc(working_folder, capsys):
    lines = run_dry(slurm, capsys, *JOB, "--dry-run", "--", *SWEEP, "budget.finish_by=2035-12-04T18:00")
    local = datetime(2035, 12, 4, 18).astimezone().isoformat()
    assert lines[-1].endswith(f" budget.finish_by={local}")


def test_a_deadline_in_the_past_is_not_submitted(working_folder, capsys):
    said = run_refused(slurm, capsys, *JOB, "--dry-run", "--", *SWEEP, "budget.finish_by=2020-12-04T18:00")
    assert "budget.finish_by=2020-12-04T18:00 is in the past" in said
