"""tune.py with a budget, as a user starts it, killed in the middle and resumed."""

import json
import signal
import time

import pytest
import yaml

from handpose.config_files import REPOSITORY
from handpose.evaluation.submission import read_course
from handpose.sweep.audit.audit import audit
from tests.builders import write_freihand
from tests.subprocesses import start_program, wait_for_end
from tests.sweep.trainable.test_trial import SMALL

pytestmark = pytest.mark.slow

GIVEN = [*SMALL, "data.root=freihand", "trainer.accelerator=cpu", "sweep.gpus_per_trial=0", "ray.num_cpus=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    write_freihand(folder / "freihand", num_poses=24, variants=1, num_test=6, size=64)
    return folder


def start(place, *overrides):
    return start_program(REPOSITORY / "tune.py", *overrides, cwd=place)


@pytest.fixture(scope="module")
def killed(place):
    """The seconds that a sweep had used when it was killed in its confirmation, and its folder."""
    process = start(place, *GIVEN, "sweep.name=timed", "budget.minutes=4", "sweep.num_trials=3", "sweep.max_epochs=2")
    file = place / "outputs/sweeps/timed/budget.json"
    while not (file.is_file() and "confirmation" in json.loads(file.read_text())["seconds"]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    return sum(json.loads(file.read_text())["seconds"].values()), out, file.parent


def test_the_plan_is_printed_and_recorded_and_keeps_the_values_of_the_user(killed):
    _, out, folder = killed
    assert "the budget  budget.minutes=4, of which" in out
    assert "up to 3 trials of at most 2 epochs" in out
    record = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert record["config"]["budget"]["minutes"] == 4
    assert 0 < record["config"]["sweep"]["time_budget_s"] < 240
    assert not any(item.startswith("sweep.num_trials") and item != "sweep.num_trials=3" for item in record["overrides"])


def test_the_resumed_sweep_counts_the_time_before_and_ends_with_predictions(killed, place):
    used_s, _, folder = killed
    process = start(place, f"sweep.resume={folder}")
    status, out, err = wait_for_end(process, timeout_s=400)
    assert status == 0, err
    seconds = json.loads((folder / "budget.json").read_text())["seconds"]
    assert list(seconds) == ["preparation", "trials", "confirmation", "retraining", "report"]
    assert sum(seconds.values()) > used_s
    assert "of budget.minutes=4: preparation" in out
    assert "the budget gives it" in out  # the retraining
    assert len(read_course(folder / "retrain" / "test_preds.json.gz")) == 6
    assert (folder / "report.html").is_file()
    assert not audit(folder)


def test_what_cannot_fit_is_refused_before_a_trial_is_trained(place):
    process = start(
        place, *GIVEN, "sweep.name=huge", "budget.minutes=2", "sweep.num_trials=5000", "sweep.max_epochs=100"
    )
    status, _, err = wait_for_end(process, timeout_s=300)
    assert status == 2
    assert "error: budget.minutes=2 leaves" in err
    assert "sweep.num_trials=5000, sweep.max_epochs=100 do not fit: at least about" in err
    assert not (place / "outputs/sweeps/huge").exists()
