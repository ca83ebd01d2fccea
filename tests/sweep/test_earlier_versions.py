"""What an earlier version of the project left behind is still read: a sweep's folder and a checkpoint of format 2.

tests/sweep/earlier_versions/format_2 is such a sweep: two of its three trials were stopped at their first rung. Of its
checkpoints one is kept. hand.json is what that version's `python -m handpose.predict` found with this checkpoint.
"""

import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from handpose.config_files import REPOSITORY
from handpose.export import main as export
from handpose.formats import MOVED, SWEEP_YAML_FORMAT
from handpose.predict import main as predict
from handpose.sweep.analysis.read_sweep import read_sweep
from handpose.sweep.analysis.report import write_report
from handpose.sweep.audit.audit import audit
from handpose.sweep.driver.resume import load_recorded_task
from handpose.sweep.record.events import read_events
from handpose.sweep.why import tell_story_of
from handpose.yaml_files import read_yaml

KEPT = Path(__file__).parent / "earlier_versions" / "format_2"
CHECKPOINT = KEPT / "checkpoints" / "trial_0002" / "epoch_0001_stretch_1.ckpt"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(KEPT, tmp_path / "before_rooms"))


@pytest.mark.parametrize("target", MOVED.values())
def test_a_class_that_moved_is_where_the_table_says(target):
    assert isinstance(pkgutil.resolve_name(target), type)


def test_its_classes_are_read_under_their_new_names(folder):
    before = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))["config"]["scheduler"]["_target_"]
    assert before == "handpose.sweep.rules.Asha"
    now = read_yaml(folder / "sweep.yaml")["config"]["scheduler"]["_target_"]
    assert now == "handpose.schedulers.asha.Asha"


def test_its_keys_are_read_under_their_new_names(folder):
    before = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))
    now = read_yaml(folder / "sweep.yaml")
    assert now["fixed_params"] == before["held"]
    assert now["config"]["sweep"]["quarantine_after_failures"] == before["config"]["sweep"]["set_aside_after"]
    assert now["config"]["sweep"]["divergence_factor"] == before["config"]["sweep"]["explosion_factor"]
    assert now["config"]["searcher"]["points_to_evaluate"] == before["config"]["searcher"]["first"]
    assert not {"set_aside_after", "explosion_factor", "first"} & {*now["config"]["sweep"], *now["config"]["searcher"]}


def test_its_searcher_and_sampler_keep_the_defaults_of_its_time(folder):
    task = load_recorded_task(folder, [])
    assert task.config.searcher.sampler._target_ == "optuna.samplers.TPESampler"
    assert task.config.searcher.sampler.multivariate is None
    assert task.config.searcher.sampler.group is True
    assert {"searcher.sampler.multivariate=null", "searcher.sampler.group=true"} <= set(task.overrides)


def test_its_report_has_its_trials_and_rungs(folder):
    record = read_sweep(folder)
    assert [trial.state for trial in record.trials] == ["stopped", "complete", "stopped"]
    assert record.rungs == (1,)
    written = write_report([folder], folder / "report.html")
    assert "PA-MPJPE" in written.file.read_text(encoding="utf-8")


def test_its_trials_have_stories_without_reasons(folder):
    assert [line.text for line in tell_story_of(str(folder), 0)] == [
        "proposed by the searcher",
        "parameters: depth 1, lr 0.000411",
        "started on node vm",
        "epoch 1: PA-MPJPE 46.55 mm; paused",
        "stopped",
    ]
    assert {trial.reason for trial in read_sweep(folder).trials} == {""}


def test_its_audit_asks_for_no_reasons(folder):
    assert not [finding for kind in audit(folder) for finding in kind if "reason" in finding or "origin" in finding]


def test_its_searcher_has_another_name_now_and_is_the_same(folder):
    assert read_yaml(folder / "sweep.yaml")["choices"]["searcher"] == "optuna"
    assert not [finding for finding in audit(folder).wrong if "choices" in finding]


def test_its_checkpoint_predicts_what_it_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    camera = ["--focal", "100", "--scale", "28"]
    assert predict(["noise.png", "--checkpoint", str(CHECKPOINT), "--device", "cpu", *camera]) == 0
    (hand,) = json.loads((tmp_path / "hands" / "hands.json").read_text(encoding="utf-8"))["hands"]
    expected = json.loads((KEPT / "hand.json").read_text(encoding="utf-8"))["xyz_mm"]
    assert np.array(hand["xyz_mm"]) == pytest.approx(np.array(expected), rel=1e-3, abs=0.5)


@pytest.mark.slow
def test_its_checkpoint_is_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "gray").save(tmp_path / "gray.png")
    export(["--checkpoint", str(CHECKPOINT), "--output", "hand.onnx", "--images", "."])
    assert (tmp_path / "hand.onnx").stat().st_size > 100_000


@pytest.mark.slow
def test_it_is_resumed_with_one_more_trial(folder, tmp_path):
    record = yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))
    del record["data_fingerprint"]  # hands that are drawn here may differ in their last bits
    (folder / "sweep.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    before = read_events(folder / "events.jsonl")
    places = [
        f"paths.data={tmp_path / 'data'}",
        f"paths.output={tmp_path / 'out'}",
        f"paths.packed={tmp_path / 'packed'}",
    ]
    data = f"data.root={tmp_path / 'data' / 'synthetic'}"
    more = [f"sweep.resume={folder}", "sweep.num_trials=4", "sweep.retrain=false", data, *places]
    command = [sys.executable, str(REPOSITORY / "tune.py"), *more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    after = read_events(folder / "events.jsonl")
    assert after[: len(before)] == before
    assert {event.trial for event in after[len(before) :] if hasattr(event, "trial")} >= {3}
    assert [trial.number for trial in read_sweep(folder).trials] == [0, 1, 2, 3]
    assert yaml.safe_load((folder / "sweep.yaml").read_text(encoding="utf-8"))["format"] == SWEEP_YAML_FORMAT
