"""What a job's environment says of its hosts, and what of it Ray and trials must not see."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
from lightning_fabric.utilities import rank_zero
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment

from cluster import node
from cluster.allocation import Lsf, SingleMachine, Slurm, find_allocation, remove_scheduler_variables
from cluster.node import explain_core_limit, find_own_address, make_ray_command
from handpose.config import compose
from handpose.errors import UserError
from handpose.resources import Memory
from handpose.training.trainer import make_prediction_trainer, suppress_library_output

IN_A_STEP = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "LSB_JOBID": "7"}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes the given programs the only ones; each prints a text."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def made(**programs):
        for name, text in programs.items():
            file = tmp_path / "bin" / name
            file.write_text(f"#!/bin/sh\necho {text}\n")
            file.chmod(0o755)

    return made


FOUR_NODES = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "a[01-04]"}


def test_each_host_of_a_slurm_job_has_its_own_number_of_cpus(install):
    install(scontrol="a01 a02 a03 a04", srun="")
    found = find_allocation({**FOUR_NODES, "SLURM_JOB_CPUS_PER_NODE": "16(x2),8,64", "SLURM_CPUS_ON_NODE": "16"})
    assert found == Slurm("7", ["a01", "a02", "a03", "a04"], {"a01": 16, "a02": 16, "a03": 8, "a04": 64})
    for host, cpus in (("a02", 16), ("a03", 8), ("a04", 64)):
        command = found.command_on(host, ["python", "x"])
        assert {f"--nodelist={host}", f"--cpus-per-task={cpus}"} <= set(command)
        assert command[-2:] == ["python", "x"]


def test_the_cpus_of_a_task_that_the_user_asked_for_are_those_of_each_host(install):
    install(scontrol="a01 a02 a03 a04", srun="")
    given = {**FOUR_NODES, "SLURM_JOB_CPUS_PER_NODE": "16(x2),8,64", "SLURM_CPUS_PER_TASK": "6"}
    assert set(find_allocation(given).cpus.values()) == {6}


def test_a_step_has_the_environment_of_the_job_also_where_a_site_exports_nothing(install):
    """SBATCH_EXPORT=NONE sets SLURM_EXPORT_ENV=NONE in the job, which srun would obey."""
    install(scontrol="a01 a02 a03 a04", srun="")
    assert "--export=ALL" in find_allocation(FOUR_NODES).command_on("a02", ["x"])


@pytest.mark.parametrize("programs", [{}, {"scontrol": "a01 a02 a03 a04"}, {"srun": ""}])
def test_a_job_that_could_use_only_one_of_its_nodes_is_refused(install, programs):
    """As in a container without the programs of Slurm."""
    install(**programs)
    with pytest.raises(UserError, match=r"this job has 4 nodes, but s.* cannot be found.* --wrap 'apptainer exec"):
        find_allocation(FOUR_NODES)


@pytest.mark.parametrize("listed", ["", "a01 a02"])
def test_nodes_that_are_not_listed_are_refused(install, listed):
    install(scontrol=listed, srun="")
    with pytest.raises(UserError, match=r"has 4 nodes, but `scontrol show hostnames a\[01-04\]` does not list them"):
        find_allocation(FOUR_NODES)


def test_a_job_of_one_node_needs_no_programs_of_slurm(install):
    install()
    found = find_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "a03"})
    assert (found.job, found.hosts) == ("7", ["a03"])
    assert found.requeue() == "scontrol is not installed here"


def test_an_lsf_job_that_could_use_only_one_of_its_hosts_is_refused(install):
    install()
    with pytest.raises(UserError, match="this job has 2 nodes, but blaunch cannot be found"):
        find_allocation({"LSB_JOBID": "12", "LSB_MCPU_HOSTS": "a01 8 a02 8"})
    assert find_allocation({"LSB_JOBID": "12", "LSB_MCPU_HOSTS": "a01 8"}).hosts == ["a01"]


def test_a_job_for_whole_machines_that_is_bound_to_some_cores_says_so():
    """LSF binds a job with one slot a host to one core, although it has the host for itself."""
    told = explain_core_limit("a01", cpus=None, usable=1, total=64)
    assert told == "node: a01 has 64 cores, but this job may use only 1 of them; give --cpus-per-node 64"
    assert explain_core_limit("a01", cpus=None, usable=64, total=64) == ""
    assert explain_core_limit("a01", cpus=8, usable=8, total=64) == ""


def test_hosts_of_an_lsf_job_are_named_once_the_first_is_here(install):
    install(blaunch="")
    found = find_allocation({"LSB_JOBID": "12", "LSB_MCPU_HOSTS": "a01 8 a02 8"})
    assert found == Lsf("12", ["a01", "a02"])
    assert found.command_on("a02", ["python", "x"]) == ["blaunch", "a02", "python", "x"]


def test_without_a_scheduler_there_is_this_machine():
    assert find_allocation({}) == SingleMachine(str(os.getpid()), [os.uname().nodename])


def node_options(*, head=None, cpus=None):
    given = Namespace(host="a01", head=head, cpus=cpus, gpus=None)
    return dict(
        option[2:].split("=") for option in make_ray_command(given, folder=Path("/x"), address=None) if "=" in option
    )


def test_ray_has_the_cores_and_the_memory_that_the_job_has_on_a_node(monkeypatch):
    monkeypatch.setattr(node, "count_cores", lambda: 3)
    monkeypatch.setattr(node, "measure_memory", lambda: Memory(total=int(8e9), available=int(7e9), is_limited=True))
    options = node_options(head="10.0.0.1:6379")
    assert options["num-cpus"] == "3"
    assert 5e9 < int(options["memory"]) < 7e9
    assert node_options(cpus=2)["num-cpus"] == "2"
    assert node_options(cpus=64)["num-cpus"] == "3"
    assert int(node_options()["memory"]) < int(options["memory"])  # tune.py runs beside the head


def test_a_node_keeps_its_gpus_and_loses_its_rank():
    kept = {"CUDA_VISIBLE_DEVICES": "0,1", "PATH": "/bin", "LS_COLORS": "", "RAY_AUTH_MODE": "token"}
    gone = IN_A_STEP | {"PMI_RANK": "1", "PMIX_RANK": "1", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert remove_scheduler_variables(kept | gone) == kept


@pytest.fixture
def slurm_step(monkeypatch):
    """This process as the second one of a job's step would see itself."""
    for name, value in IN_A_STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_lightning_takes_a_process_of_a_job_for_one_of_several_unless_the_scheduler_is_hidden(slurm_step):
    """Of another rank than 0 nothing is logged or saved; this is why the scheduler is hidden."""
    assert rank_zero._get_rank() == 1
    for name in os.environ.keys() - remove_scheduler_variables(os.environ).keys():
        slurm_step.delenv(name)
    assert rank_zero._get_rank() is None


def test_a_trial_in_a_job_is_trained_alone_though_lightning_sees_the_scheduler(slurm_step):
    """The same Trainer trains trials, retraining and single runs; theirs are signals and ranks of its own."""
    with suppress_library_output():
        trainer = make_prediction_trainer(compose("train", ["trainer.accelerator=cpu"]), quiet=True)
    assert SLURMEnvironment.detect()
    assert type(trainer._accelerator_connector.cluster_environment) is LightningEnvironment
    assert (trainer.global_rank, trainer.world_size, trainer.is_global_zero) == (0, 1, True)


def test_an_address_is_looked_for_in_the_network_that_was_given():
    assert find_own_address(network="127.0.0.0/8", host="x", other=None) == "127.0.0.1"
    with pytest.raises(ValueError, match=r"x has no address in --network 203\.0\.113\.0/24"):
        find_own_address(network="203.0.113.0/24", host="x", other=None)


def test_an_address_that_nobody_else_could_reach_is_left_to_ray():
    assert find_own_address(network=None, host="x", other=None) is None
    assert find_own_address(network=None, host="x", other="127.0.0.1") is None
    assert find_own_address(network=None, host="x", other="no.such.host.invalid") is None
