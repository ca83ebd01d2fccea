"""What Tune's news means to a sweep, without Tune."""

import time
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.tune.experiment import Trial

from handpose.sweep.execution.nodes import Node, NodeWatcher
from handpose.sweep.execution.tune_bridge import BridgeScheduler, _classify_failure, get_segment, summarise_error_text
from handpose.sweep.trainable.reporting import AVOIDED_NODES_KEY, SEGMENT_KEY

NODE_DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: ImplicitFunc\n"
    "The actor died because its node has died. Node Id: 5a1861ca\n"
    "\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"
)
WORKER_DIED = "The actor died unexpectedly.\nThe actor is dead because its worker process has died."
RESET = "RpcError: RPC error: recvmsg:Connection reset by peer rpc_code: 14"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RayActorError(error_msg=NODE_DIED), "lost", "its node was lost"),
        (ActorUnavailableError(RESET, b"0" * 16), "lost", "its node was lost"),
        (RayActorError(error_msg=NODE_DIED, preempted=True), "preempted", "its node was lost"),
        (RayActorError(error_msg=WORKER_DIED), "killed", "the worker process died: it was killed, ran out of memory"),
        (ValueError("the server is unavailable"), "error", "the server is unavailable"),
    ],
    ids=["health check", "connection", "preempted", "worker", "error"],
)
def test_a_lost_node_is_told_from_a_worker_that_was_killed(error, kind, said):
    text = str(error)  # as Ray 2.60 said it when a node, or a worker, was ended by SIGKILL
    assert _classify_failure(error, text) == kind
    assert summarise_error_text(text).startswith(said)


@pytest.fixture
def scheduler():
    """With the nodes 1 and 2, and a list of the trials that were taken back."""
    alive, taken_back = [Node("1", "gpu1", {}), Node("2", "gpu2", {})], []
    abandoned = []
    nodes = NodeWatcher(lambda alive: None, list_nodes=lambda: list(alive), clock=iter(range(0, 1000, 2)).__next__)
    fits = SimpleNamespace(
        can_place_without=lambda names: bool({node.name for node in alive} - names),
        is_abandoned=abandoned.__contains__,
        abandoned=abandoned,
    )
    bridge = SimpleNamespace(
        nodes=nodes,
        hang_timeout_s=60.0,
        controller=fits,
        check_start=lambda trials: None,
        end_idle_workers=lambda tune_controller: tune_controller.ended.append("idle workers"),
    )
    return BridgeScheduler(bridge), alive, taken_back


def make_trial(status, avoided, *, silent_s=0.0):
    known = SimpleNamespace(start_time=time.time() - silent_s, last_result_time=-float("inf"))
    actor = SimpleNamespace() if status == Trial.RUNNING else None
    config, temporary = {AVOIDED_NODES_KEY: [avoided], SEGMENT_KEY: [object()]}, SimpleNamespace(ray_actor=actor)
    return SimpleNamespace(
        trial_id=str(avoided), status=status, config=config, run_metadata=known, temporary_state=temporary
    )


def test_what_waits_for_nodes_that_are_gone_is_taken_back(scheduler):
    scheduler, alive, taken_back = scheduler
    waiting, free, running = (
        make_trial(Trial.PENDING, ["1"]),
        make_trial(Trial.PENDING, []),
        make_trial(Trial.RUNNING, ["1"]),
    )
    controller = SimpleNamespace(
        get_live_trials=lambda: [waiting, free, running], stop_trial=taken_back.append, ended=[]
    )
    scheduler.choose_trial_to_run(controller)
    assert taken_back == []
    alive.pop()
    scheduler.choose_trial_to_run(controller)
    assert taken_back == [waiting]


def test_idle_workers_are_not_ended_while_a_trial_waits_that_one_of_them_will_train(scheduler):
    scheduler, _, _ = scheduler
    waiting, running = make_trial(Trial.PENDING, []), make_trial(Trial.RUNNING, ["2"])
    controller = SimpleNamespace(get_live_trials=lambda: [waiting, running], ended=[])
    scheduler.choose_trial_to_run(controller)
    assert controller.ended == []
    controller.get_live_trials = lambda: [running]
    scheduler.choose_trial_to_run(controller)
    assert controller.ended == ["idle workers"]


def test_a_worker_that_says_nothing_for_too_long_is_ended_once(scheduler, monkeypatch):
    scheduler, _, _ = scheduler
    ended = []
    monkeypatch.setattr("handpose.sweep.execution.tune_bridge.ray.kill", ended.append)
    hanging, other = make_trial(Trial.RUNNING, [], silent_s=61.0), make_trial(Trial.RUNNING, ["2"], silent_s=59.0)
    for _ in range(2):
        scheduler.choose_trial_to_run(SimpleNamespace(get_live_trials=lambda: [hanging, other], ended=[]))
    assert ended == [hanging.temporary_state.ray_actor]


def test_a_worker_whose_trial_the_user_has_stopped_may_report_once_more_and_is_killed_then(scheduler, monkeypatch):
    scheduler, _, taken_back = scheduler
    ended, now = [], [100.0]
    monkeypatch.setattr("handpose.sweep.execution.tune_bridge.ray.kill", ended.append)
    monkeypatch.setattr("handpose.sweep.execution.tune_bridge.time.monotonic", lambda: now[0])
    running, waiting, other = (make_trial(state, []) for state in (Trial.RUNNING, Trial.PENDING, Trial.RUNNING))
    for name, trial in (("a", running), ("b", waiting), ("c", other)):
        trial.trial_id = name
    scheduler._bridge.controller.abandoned += [get_segment(running), get_segment(waiting)]
    controller = SimpleNamespace(get_live_trials=lambda: [running, other], stop_trial=taken_back.append, ended=[])
    scheduler.choose_trial_to_run(controller)
    now[0] += 9.0
    scheduler.choose_trial_to_run(controller)
    assert ended == []
    now[0] += 2.0
    for _ in range(2):
        scheduler.choose_trial_to_run(controller)
    assert ended == [running.temporary_state.ray_actor]
    controller.get_live_trials = lambda: [waiting]
    scheduler.choose_trial_to_run(controller)
    assert taken_back == [waiting]
