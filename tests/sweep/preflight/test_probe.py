"""Which points are tried, and who is to blame for those that fail."""

import itertools
from types import SimpleNamespace

import pytest
import ray

from handpose.errors import UserError
from handpose.sweep.execution import probe_worker as probing
from handpose.sweep.execution.probe_worker import ProbeWorker
from handpose.sweep.preflight.probe import (
    LOWER,
    OPTION,
    RANDOM,
    UPPER,
    ProbePoint,
    ProbeResults,
    choose_probe_points,
    find_ineffective_params,
    probe_points,
)
from handpose.sweep.trainable.trial import TrialRecipe
from handpose.sweep.trainable.trial_cost import DataSize, ProbeFailure, TrialCost
from tests.sweep.preflight.fake_cost_probes import FragileCostProbe

COST = TrialCost(
    num_parameters=1_000_000,
    start_s=1.0,
    step_s=0.1,
    validation_batch_s=0.05,
    steps_per_epoch=10,
    batches_per_validation=2,
    max_epochs=4,
    validation_interval=1,
    memory_mb=100.0,
    gpu_memory_fraction=0.0,
    process_mb=1000.0,
    gpu="",
    latency_ms=5.0,
    checkpoint_mb=20.0,
    trace=(1.0, 2.0),
    ignored=(),
)


class FakeProbeWorker:
    """Answers by a rule what a worker would measure."""

    def __init__(self, scheduler, *, gpus=0.0):
        self.rule = scheduler
        self.gpus = gpus
        self.start_s = 5.0
        self.asked = []

    def measure_params(self, params, *, num_steps=3, weights=False):
        self.asked.append(dict(params))
        answer = self.rule(params)
        return answer if isinstance(answer, (ProbeFailure, TrialCost)) else COST


def run_probe(bench, points, *, default=None, time_s=60.0):
    space = SimpleNamespace(file="space.yaml")
    points = [ProbePoint(RANDOM, params) for params in points]
    return probe_points(bench, points, space=space, default=default, num_steps=3, weights=False, time_s=time_s)


GOOD_PARAMS = {"a": 0, "b": 0, "c": 0, "d": 0}
BAD_PARAMS = {"a": 1, "b": 1, "c": 1, "d": 1}


@pytest.mark.parametrize(
    "guilty", [subset for size in (1, 2, 3, 4) for subset in itertools.combinations("abcd", size)], ids="".join
)
def test_exactly_those_parameters_are_named_that_fail_together(guilty):
    error = ProbeFailure("error", "RuntimeError: no")
    probe_worker = FakeProbeWorker(lambda params: error if all(params[key] for key in guilty) else None)
    with pytest.raises(UserError) as raised:
        run_probe(probe_worker, [GOOD_PARAMS, BAD_PARAMS])
    named = " ".join(f"{key}=1" for key in guilty)
    assert str(raised.value) == f"space.yaml: {named} cannot be trained: RuntimeError: no"


def test_a_point_is_held_against_the_default_configuration_where_that_lies_in_the_space():
    probe_worker = FakeProbeWorker(lambda params: ProbeFailure("error", "no") if params["a"] > 1 else None)
    with pytest.raises(UserError, match=r"space.yaml: a=2 cannot be trained"):
        run_probe(probe_worker, [{"a": 2, "b": 5}, {"a": 0, "b": 0}], default={"a": 1, "b": 5})
    assert probe_worker.asked == [{"a": 2, "b": 5}, {"a": 1, "b": 5}]


def test_another_failure_on_the_way_clears_nobody():
    def rule(params):
        if params["a"] and params["b"]:
            return ProbeFailure("memory", "full")
        return ProbeFailure("value", "a without b") if params["a"] else None

    with pytest.raises(
        UserError, match=r"space.yaml: a=1 b=1 cannot be trained, because there is not enough memory: full"
    ):
        run_probe(FakeProbeWorker(rule), [GOOD_PARAMS, BAD_PARAMS])


@pytest.mark.parametrize(("gpus", "remedy"), [(0.5, "a larger sweep.gpus_per_trial"), (0.0, "sweep.max_concurrent")])
def test_what_helps_against_too_little_memory_is_said(gpus, remedy):
    probe_worker = FakeProbeWorker(
        lambda params: ProbeFailure("memory", "CUDA out of memory") if params["a"] else None, gpus=gpus
    )
    with pytest.raises(UserError, match=rf"a=1 cannot be trained.*data.batch_size.*{remedy}"):
        run_probe(probe_worker, [GOOD_PARAMS, BAD_PARAMS])


def test_a_crash_is_not_said_to_be_for_want_of_memory():
    crash = ProbeFailure("crashed", "the worker process crashed with SIGSEGV (Segmentation fault)")
    with pytest.raises(UserError) as raised:
        run_probe(FakeProbeWorker(lambda params: crash if params["a"] else None), [GOOD_PARAMS, BAD_PARAMS])
    assert str(raised.value) == f"space.yaml: a=1 cannot be trained: {crash.reason}"


def test_a_mistake_that_names_its_key_is_told_as_it_is():
    probe_worker = FakeProbeWorker(
        lambda params: ProbeFailure("value", "a must be at least 2, but it is 1") if params["a"] else None
    )
    with pytest.raises(UserError, match=r"^space.yaml: a must be at least 2, but it is 1$"):
        run_probe(probe_worker, [GOOD_PARAMS, BAD_PARAMS])
    assert probe_worker.asked == [GOOD_PARAMS, BAD_PARAMS]


def test_where_nothing_can_be_trained_no_parameter_is_blamed():
    probe_worker = FakeProbeWorker(lambda params: ProbeFailure("error", "ImportError: no torch"))
    with pytest.raises(UserError, match=r"^space.yaml: no point that was tried can be trained: ImportError: no torch$"):
        run_probe(probe_worker, [GOOD_PARAMS, BAD_PARAMS])


def test_the_first_points_are_tried_whatever_they_take_and_the_others_are_counted():
    probed = run_probe(FakeProbeWorker(lambda params: None), [{"a": number} for number in range(10)], time_s=0.0)
    assert len(probed.points) == len(probed.costs) == 3
    assert probed.num_left_out == 7


def test_a_parameter_without_effect_is_one_that_leaves_the_trace_alone():
    probe_worker = FakeProbeWorker(lambda params: COST._replace(trace=(params["model.width"], params["optimizer.lr"])))
    start = {"model.width": 1, "heatmap.sigma": 1, "optimizer.lr": 1, "lr_schedule.final": 1, "model.skips": 1}
    others = {"model.width": 2, "heatmap.sigma": 2, "optimizer.lr": 2, "lr_schedule.final": 2, "model.skips": 1}
    probed = ProbeResults([ProbePoint(LOWER, start), ProbePoint(UPPER, others)], [COST, COST])
    assert list(find_ineffective_params(probe_worker, probed, start)) == [
        "heatmap.sigma"
    ]  # a schedule may act later; skips did not move


def test_points_are_both_ends_some_at_random_and_every_option_and_none_twice(write_space):
    space = write_space("optimizer.lr: interval(0.1, 0.9)\nmodel.decoder.skips: choice(a, b, c, d)")
    points = choose_probe_points(space, num_random=3)
    assert [point.label for point in points] == [LOWER, UPPER, RANDOM, RANDOM, RANDOM, OPTION, OPTION]
    assert [point.params["optimizer.lr"] for point in points[:2]] == [0.1, 0.9]
    assert {point.params["model.decoder.skips"] for point in points if point.label != RANDOM} == set("abcd")
    assert len({str(point.params) for point in points}) == len(points)
    assert len(choose_probe_points(write_space("model.decoder.skips: choice(a)"), num_random=3)) == 1


RECIPE = TrialRecipe(["seed=1"], ["paths.base=/x"], max_epochs=3, num_threads=1)
DATA = DataSize(32, 10, 5)


@pytest.fixture(scope="module")
def probe_worker(ray_started):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "TrialCostProbe", FragileCostProbe)
        with ProbeWorker(cpus=1, gpus=0.0, recipe=RECIPE, data=DATA) as probe_worker:
            yield probe_worker


@pytest.mark.slow
def test_a_point_that_kills_its_worker_is_told_and_the_next_one_has_another(probe_worker):
    first, overrides, _ = probe_worker.measure_params({"a": 1})
    assert probe_worker.measure_params({"a": 2})[0] == first
    assert "trainer.max_epochs=3" in overrides
    assert "a=1" in overrides
    refusal = probe_worker.measure_params({"kills": True})
    assert refusal.kind == "killed"
    assert probe_worker.measure_params({"a": 3})[0] != first


@pytest.mark.slow
def test_a_point_that_never_ends_is_told_and_the_next_one_has_another_worker(probe_worker, monkeypatch):
    first, *_ = probe_worker.measure_params({"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr(probing, "_TIMEOUT_S", 0.5)
        assert probe_worker.measure_params({"hangs": True}).kind == "time"
    assert probe_worker.measure_params({"a": 2})[0] != first


@pytest.fixture
def stuck_probe_worker(ray_started, monkeypatch):
    """A bench whose worker never gets the cores that it asks for."""
    monkeypatch.setattr(probing, "PROBE_AFTER_S", 0.2)
    monkeypatch.setattr(probing, "PATIENCE_S", 0.4)
    with ProbeWorker(cpus=1_000, gpus=0.0, recipe=RECIPE, data=DATA) as probe_worker:
        yield probe_worker


def test_a_slot_that_others_hold_is_told_from_a_worker_that_never_starts(stuck_probe_worker, monkeypatch):
    monkeypatch.setattr(probing.StartProbe, "has_run", lambda probe: bool(ray.wait([probe._done], timeout=60.0)[0]))
    with pytest.raises(UserError, match=r"^no slot \(sweep.cpus_per_trial=1000, sweep.gpus_per_trial=0\) was free"):
        stuck_probe_worker.measure_params({"a": 1})
    monkeypatch.setattr(probing.StartProbe, "has_run", lambda probe: False)
    with pytest.raises(UserError, match=r"^Ray has not started a worker process within .* this Python"):
        stuck_probe_worker.measure_params({"a": 1})
