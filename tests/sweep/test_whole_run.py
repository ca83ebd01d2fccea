"""tune.py from the first trial to the report, in the locale Latin-1: what it leaves, and what it lets nobody see.

Its environment has secrets and an empty home folder and, where that is allowed, no network.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from handpose.config_files import REPOSITORY
from handpose.sweep.audit.audit import audit
from tests.builders import SMALL, write_freihand
from tests.programs import command_line
from tests.sweep.test_secrets import PLANTED, SECRETS, list_files_with_secrets, list_processes_with_secrets
from tests.test_home import OF_RAY, environment, list_files, make_offline_command

pytestmark = pytest.mark.slow

TINY = [
    *SMALL,
    "data.root=Hände",
    "model.encoder.pretrained=false",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "num_threads=1",
]
SWEEP = ["search_space=Räume.yaml", "sweep.name=eins", "sweep.num_trials=2", "sweep.max_epochs=1"]
SWEEP += ["sweep.confirm.top_k=1", "sweep.confirm.seeds=1", "searcher.storage=${oc.env:STUDY_URL}"]
SWEEP += ["trainer.accelerator=cpu", "sweep.gpus_per_trial=0", "sweep.max_concurrent=1"]


class Run(NamedTuple):
    """A run of tune.py that has ended.

    Attributes:
        place: the working folder.
        variables: its environment.
        status: what it returned.
        out: its standard output.
        err: its standard error.
        home: what it left in its home folder.
        secrets: files and processes in which a secret was seen meanwhile.
        num_looks: how often the folder of Ray's session was seen.
    """

    place: Path
    variables: dict[str, str]
    status: int
    out: str
    err: str
    home: set[str]
    secrets: set[str]
    num_looks: int

    @property
    def folder(self):
        return self.place / "outputs" / "sweeps" / "eins"


@pytest.fixture(scope="module")
def run(latin_1, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    place = root / "Größe"
    write_freihand(place / "Hände", num_poses=24, variants=1, num_test=6, size=64)
    (place / "Räume.yaml").write_text("# Größe des Netzes\nmodel.decoder.depth: range(1, 3)\n", encoding="utf-8-sig")
    (root / "study").mkdir()
    url = f"sqlite:///{root / 'study' / 'study.db'}?uri=true&password={SECRETS['STUDY_URL']}"
    variables = environment(root / "home") | latin_1 | SECRETS | {"STUDY_URL": url, "DIR_SCRATCH": "outputs"}
    command = [*make_offline_command(), sys.executable, str(REPOSITORY / "tune.py"), *TINY, *SWEEP]
    secrets, num_looks = set(), 0
    # Sockets lie in the folder for temporary files, whose paths have 107 characters.
    with tempfile.TemporaryDirectory(prefix="hps", ignore_cleanup_errors=True) as short:
        variables["TMPDIR"] = short
        with (root / "out").open("wb") as out, (root / "err").open("wb") as err:
            process = subprocess.Popen(command, cwd=place, env=variables, stdout=out, stderr=err)
            while process.poll() is None:
                secrets |= list_files_with_secrets(Path(short)) | list_processes_with_secrets()
                num_looks += any(Path(short).glob("handpose-*/ray/session_*/logs"))
                time.sleep(1.0)  # the sweep needs the processor too
        secrets |= list_files_with_secrets(Path(short))
    texts = [(root / name).read_bytes().decode("utf-8") for name in ("out", "err")]
    return Run(place, variables, process.returncode, *texts, list_files(root / "home"), secrets, num_looks)


def test_it_goes_all_the_way(run, monkeypatch):
    assert run.status == 0, run.err
    assert (run.folder / "retrain" / "pred.zip").is_file()
    assert f"report      {run.folder / 'report.html'}" in run.out
    (study,) = (run.place.parent / "study").iterdir()  # SQLite takes the password for a part of the name
    shutil.copyfile(study, run.place.parent / "study.db")
    monkeypatch.setenv("STUDY_URL", f"sqlite:///{run.place.parent / 'study.db'}")
    assert not audit(run.folder)


def test_its_folder_is_read_in_that_locale(run):
    (again,) = re.findall("^train again +python train.py (.*)$", run.out, re.MULTILINE)
    commands = [
        [str(REPOSITORY / "tune.py"), f"sweep.status={run.folder}"],
        [str(REPOSITORY / "handpose" / "report" / "__main__.py"), str(run.folder)],
        [str(REPOSITORY / "train.py"), *shlex.split(again), "--cfg", "job"],
    ]
    environment = run.variables | {"TMPDIR": "/tmp"}
    done = subprocess.run(command_line(*commands), cwd=run.place, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("utf-8")
    shown, written, printed, _ = done.stdout.decode("utf-8").split("\f\n")
    assert "2/2 trials" in shown
    assert str(run.folder) in written
    assert "Hände" in printed


def test_no_secret_of_the_environment_is_in_anything_that_it_writes(run):
    """Through confirmation, retraining and report, and while it ran: Ray's session and the lists of processes."""
    assert run.num_looks, "Ray's session was never seen"
    record = yaml.safe_load((run.folder / "sweep.yaml").read_text(encoding="utf-8"))
    assert record["config"]["searcher"]["storage"] == "${oc.env:STUDY_URL}"
    assert list((run.place.parent / "study").iterdir())
    assert run.secrets | list_files_with_secrets(run.place / "outputs") == set()
    assert PLANTED.decode() not in run.out + run.err


def test_it_leaves_its_token_in_the_home_folder_and_nothing_else(run):
    assert run.home == OF_RAY
