"""What the launchers write for a scheduler, and the mistakes that they find before anything is submitted."""

import re
import shlex
import stat
import subprocess
from datetime import datetime

import pytest

from cluster import kuberay, lsf, ray_up, slurm
from cluster.submission import REPOSITORY, make_job_parser, parse_wall_time, read_submission
from tests.sweep.sweeps import write_begun_sweep

JOB = ["--nodes", "4", "--gpus-per-node", "2", "--wall-time", "04:00:00"]
SWEEP = ["sweep.name=hands", "sweep.num_trials=7"]
OPTIONS = {
    slurm: JOB,
    lsf: JOB,
    kuberay: ["--cpus-per-node", "8", "--image", "r/hands:1", "--claim", "sweeps"],
    ray_up: ["--provider", "local", "--hosts", "10.1.0.1", "--output", "hands.yaml"],
}


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


@pytest.mark.parametrize(
    ("options", "directive", "num_gpus"),
    [
        (["--gpus-per-node", "8"], "--gpus-per-node=8", "--gpus=8"),
        (["--gpus-per-node", "a100:8"], "--gpus-per-node=a100:8", "--gpus=8"),
        (["--gpus-per-node", "1g.10gb:2"], "--gpus-per-node=1g.10gb:2", "--gpus=2"),
        (["--gres", "gpu:a100:8"], "--gres=gpu:a100:8", "--gpus=8"),
        (["--gres=gpu:2,nvme:1"], "--gres=gpu:2,nvme:1", "--gpus=2"),
        (["--gres", "gpu"], "--gres=gpu", "--gpus=1"),
        (["--gres", "gpu:v100"], "--gres=gpu:v100", "--gpus=1"),
        (["--gres", "gpu:a100:1,gpu:v100:2"], "--gres=gpu:a100:1,gpu:v100:2", "--gpus=3"),
        (["--gres", "nvme:1"], "--gres=nvme:1", "--gpus=0"),
        (["--gres", "nvme:1", "--gpus-per-node", "4"], "--gpus-per-node=4", "--gpus=4"),
        (["--gres", "shard:4"], "--gres=shard:4", None),
        ([], None, "--gpus=0"),
    ],
)
def test_ray_gets_as_many_gpus_as_slurm_gives(working_folder, capsys, options, directive, num_gpus):
    lines = run_dry(slurm, capsys, "--wall-time", "01:00:00", *options, "--dry-run", "--", *SWEEP)
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH --g")]
    assert directive in asked if directive else asked == []
    told = [item for item in shlex.split(lines[-1]) if item.startswith("--gpus")]
    assert told == ([] if num_gpus is None else [num_gpus])


@pytest.mark.parametrize(
    "option",
    [
        ["--gpus", "a100:16"],
        ["-G", "16"],
        ["-G16"],
        ["--gpus=16"],
        ["--gpus-per-task=1"],
        ["-N4"],
        ["--tres-per-task=x"],
    ],
)
def test_gpus_of_the_whole_job_are_refused_with_the_option_to_give(working_folder, capsys, option):
    told = run_refused(slurm, capsys, "--wall-time", "01:00:00", *option, "--", *SWEEP)
    assert re.search(r"-\S+ is set by this launcher from its own options, such as --nodes and --gpus-per-node", told)


def test_two_requests_for_gpus_are_refused(working_folder, capsys):
    told = run_refused(slurm, capsys, *JOB, "--gres", "gpu:a100:2", "--", *SWEEP)
    assert "--gpus-per-node 2 and --gres gpu:a100:2 both ask for GPUs" in told


def test_a_type_of_gpus_is_a_model_for_lsf(working_folder, capsys):
    argv = ["--wall-time", "01:00:00", "--cpus-per-node", "8", "--gpus-per-node", "NVIDIAA100:4", "--dry-run"]
    lines = run_dry(lsf, capsys, *argv, "--", *SWEEP)
    assert '#BSUB -gpu "num=4:gmodel=NVIDIAA100:mode=shared:j_exclusive=yes"' in lines
    assert "--gpus=4" in shlex.split(lines[-1])


@pytest.mark.parametrize(("options", "least"), [([], 2), (["--min-nodes", "4"], 4), (["--nodes", "1"], 1)])
def test_a_job_needs_half_of_its_nodes_unless_another_number_is_given(working_folder, capsys, options, least):
    lines = run_dry(slurm, capsys, *JOB, *options, "--dry-run", "--", *SWEEP)
    assert f"--min-nodes={least}" in shlex.split(lines[-1])


def test_a_container_is_for_the_commands_inside_the_job(working_folder, capsys):
    lines = run_dry(slurm, capsys, *JOB, "--wrap", "apptainer exec --nv 'a b.sif'", "--dry-run", "--", *SWEEP)
    assert "--wrap=apptainer exec --nv 'a b.sif'" in shlex.split(lines[-1])
    assert not any("apptainer" in line for line in lines[:-1])


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
        (
            ["--nodes", "2", "--min-nodes", "3", "--wall-time", "01:00:00", "--"],
            r"--min-nodes 3 is more than --nodes 2",
        ),
        (
            ["--gpus-per-node", "many", "--wall-time", "01:00:00", "--"],
            r"--gpus-per-node many must be a number of GPUs",
        ),
        (["--gpus-per-node", "gpu:a100:8", "--wall-time", "01:00:00", "--"], r"or TYPE:NUMBER such as a100:8"),
        (
            ["--wrap", "run 'it", "--wall-time", "01:00:00", "--"],
            r"--wrap run 'it is not a command line \(No closing quo",
        ),
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


@pytest.mark.parametrize(
    "argument",
    [
        "searcher.storage=postgresql://me:hunter2@db/x",
        "searcher.storage=postgresql://db/x?passwd=hunter2",
        "searcher.storage='postgresql://me@db/x?sslmode=require&sslpassword=hunter2'",
    ],
)
@pytest.mark.parametrize("launcher", [slurm, lsf, kuberay, ray_up])
def test_a_password_does_not_get_into_a_script(working_folder, capsys, launcher, argument):
    told = run_refused(launcher, capsys, *OPTIONS[launcher], "--", *SWEEP, argument)
    assert "hunter2" not in told
    assert "searcher.storage='${oc.env:STUDY_URL}'" in told


@pytest.mark.parametrize(
    "argument", ["s3://b/x?secret_key=hunter2", "s3://KEY:hunter2@b/x", "abfs://b@a/x?sig=hunter2"]
)
def test_the_key_of_a_store_does_not_get_into_a_script(working_folder, capsys, argument):
    told = run_refused(slurm, capsys, *JOB, "--", *SWEEP, f"sweep.storage={argument}")
    assert "hunter2" not in told
    assert "AWS_SECRET_ACCESS_KEY" in told


@pytest.mark.parametrize("launcher", [slurm, lsf, kuberay, ray_up])
@pytest.mark.parametrize("name", ["a b", "..", "a/b", "'a\n#SBATCH --wrap=x'", "'a;b'"])
def test_a_name_that_is_no_folder_is_refused_before_anything_is_submitted(working_folder, capsys, launcher, name):
    told = run_refused(launcher, capsys, *OPTIONS[launcher], "--", f"sweep.name={name}", "sweep.storage=s3://b/x")
    assert re.search(r"sweep\.name=.* must be the name of a folder", told)
    assert list(working_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sweep.metric=val/pa_mpjpe"], r"sweep\.metric=val/pa_mpjpe is not measured"),
        (["sweep.gpus_per_trial=1.5"], r"sweep\.gpus_per_trial must be a whole number"),
        (["sweep.storage=/shared"], r"sweep\.storage=/shared is not a URL"),
        (["report.scientific=seed"], r"report\.scientific=seed is not searched"),
        (["sweep.max_epochs=7", "trainer.check_val_every_n_epoch=2"], r"sweep\.max_epochs=7 must be a multiple"),
        (["train_on_val=true"], r"train_on_val=true leaves no validation split"),
        (["budget.finish_by=2020-01-01T00:00"], r"budget\.finish_by=2020-01-01T00:00 is in the past"),
    ],
)
def test_what_tune_would_refuse_is_refused_before_a_job_waits(working_folder, capsys, arguments, sentence):
    assert re.search(sentence, run_refused(slurm, capsys, *JOB, "--", *SWEEP, *arguments))


@pytest.fixture
def begun(working_folder):
    """The folder of a sweep that has been begun."""
    return write_begun_sweep(working_folder / "outputs" / "sweeps" / "hands", SWEEP)


def test_a_sweep_that_is_there_is_not_begun_again(begun, capsys):
    assert f"give sweep.resume={begun}" in run_refused(slurm, capsys, *JOB, "--", *SWEEP)
    submission = read_submission(make_job_parser(""), [*JOB, "--", f"sweep.resume={begun}", "sweep.num_trials=9"])
    assert (submission.name, submission.folder) == ("hands", begun)


def test_what_a_resumed_sweep_cannot_change_is_refused_before_a_job_waits(begun, capsys):
    told = run_refused(slurm, capsys, *JOB, "--", f"sweep.resume={begun}", "optimizer.lr=1")
    assert "optimizer.lr=1: a resumed sweep keeps its configuration" in told


def test_what_the_command_line_fixes_is_not_checked_as_if_it_were_searched(working_folder, capsys):
    """As in tune.py."""
    space = "optimizer.lr: interval(0.1, 0.2)\nmodel.decoder.depth: choice(2, many)\n"
    (working_folder / "space.yaml").write_text(space)
    arguments = [*JOB, "--dry-run", "--", *SWEEP, "search_space=space.yaml"]
    assert "model.decoder.depth" in run_refused(slurm, capsys, *arguments)
    assert run_dry(slurm, capsys, *arguments, "model.decoder.depth=2")


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
