"""The examples of docs/extending.md: short, complete, and what the page says of them."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from handpose.config_files import REPOSITORY
from handpose.formats import SWEEP_YAML_FORMAT
from tests.builders import make_cameras, make_hands, write_images
from tests.examples_of_page import read_examples, write_examples

DOORS = {"scheduler", "searcher", "metrics", "model/decoder", "model/encoder", "loss", "data", "augment"}
NETWORK = ["data=npz_hands", "model/decoder=line", "model/encoder=plain", "loss=coordinate_huber", "augment=grey"]
METRIC = "val/tips_within_20mm"
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(REPOSITORY / "pyproject.toml")]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the page's files in mine/, and pictures for its data set."""
    folder = tmp_path_factory.mktemp("user")
    write_examples(folder / "mine")
    for seed, (split, num) in enumerate((("train", 8), ("val", 4), ("test", 4))):
        place = folder / "data" / "npz_hands" / split
        write_images(place, num, size=64, seed=seed)
        np.savez(place / "labels.npz", K=make_cameras(num, 64, seed), xyz_m=make_hands(num, seed))
    return folder


def run(place, *command, timeout=500):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MP_DATA": str(place / "data")}
    done = subprocess.run(
        [sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_door_has_an_example_of_at_most_30_lines():
    examples = read_examples()
    options = {path.removeprefix("configs/").rpartition("/")[0] for path in examples if path.endswith(".yaml")}
    assert options >= DOORS
    assert all(len(text.splitlines()) <= 30 for text in examples.values())


def test_every_yaml_file_names_a_class_of_the_page():
    examples = read_examples()
    classes = {
        f"{Path(path).stem}.{node.name}"
        for path, text in examples.items()
        if path.endswith(".py")
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    }
    files = [yaml.safe_load(text) for path, text in examples.items() if path.endswith(".yaml")]
    assert {content.get("source", content)["_target_"] for content in files} == classes


@pytest.fixture(scope="module")
def contract_report(place):
    """What pytest says of the contract tests with the examples."""
    tests = [str(REPOSITORY / "tests/contracts"), str(REPOSITORY / "tests/search/test_searchers.py")]
    return run(place, *PYTEST, "-vv", *tests, "--extensions", "mine", "-k", "contracts or one_change")


@pytest.mark.slow
def test_the_examples_pass_the_contract_tests(contract_report):
    assert re.search(r"tests/contracts/.* PASSED", contract_report)
    assert not re.search(r"tests/contracts/.* SKIPPED", contract_report)


@pytest.mark.slow
def test_the_searcher_passes_the_contract_tests_of_searchers(contract_report):
    assert re.search(r"test_searchers\.py.* PASSED", contract_report)


@pytest.fixture(scope="module")
def sweep(place):
    """A sweep of two tiny trials in which everything but Ray is the page's; the folder, and what the terminal said."""
    (place / "space.yaml").write_text("model.decoder.bins: choice(1, 2)\n", encoding="utf-8")
    shown = run(
        place,
        str(REPOSITORY / "tune.py"),
        *(
            "paths.extensions=mine",
            *NETWORK,
            "data.batch_size=4",
            "scheduler=half_time",
            "searcher=one_change",
            f"sweep.metric={METRIC}",
        ),
        *("search_space=space.yaml", "sweep.name=new", "sweep.num_trials=2", "sweep.max_epochs=2", "ray.num_cpus=1"),
        *("sweep.preflight=off", "sweep.confirm.top_k=1", "sweep.confirm.seeds=1", "trainer.max_epochs=2"),
    )
    return place / "outputs" / "sweeps" / "new", shown


@pytest.mark.slow
def test_a_sweep_with_the_examples_is_ruled_by_their_metric(sweep):
    folder, shown = sweep
    record = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))
    assert record["format"] == SWEEP_YAML_FORMAT
    assert (record["config"]["sweep"]["metric"], record["config"]["sweep"]["mode"]) == (METRIC, "max")
    assert "TIPS-WITHIN-20MM" in shown
    assert METRIC in (folder / "trials.csv").read_text(encoding="utf-8").splitlines()[0]
    confirmed = yaml.safe_load((folder / "confirm" / "confirm.yaml").read_text(encoding="utf-8"))
    assert confirmed["metric"] == METRIC
    assert "TIPS-WITHIN-20MM" in (folder / "report.html").read_text(encoding="utf-8")
    assert len(list((folder / "retrain" / "checkpoints").glob("best-*tips_within_20mm*.ckpt"))) == 1


@pytest.mark.slow
def test_a_sweep_goes_on_with_the_examples_without_naming_their_folder(sweep, place):
    folder, _ = sweep
    before = (folder / "events.jsonl").read_text(encoding="utf-8").count('"epoch_reported"')
    assert before > 0
    run(place, str(REPOSITORY / "tune.py"), f"sweep.resume={folder}", "sweep.num_trials=2")
    assert (folder / "events.jsonl").read_text(encoding="utf-8").count('"epoch_reported"') == before


@pytest.mark.slow
def test_train_py_tests_the_checkpoint_of_the_winner(sweep, place):
    (checkpoint,) = (sweep[0] / "retrain" / "checkpoints").glob("best-*.ckpt")
    program = [str(REPOSITORY / "train.py"), f"best={sweep[0] / 'best.yaml'}", f"model.checkpoint_path={checkpoint}"]
    assert "test" in run(place, *program, "test=true")
