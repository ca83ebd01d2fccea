"""Ctrl-C and SIGTERM in a training: when they take effect."""

import os
import queue
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from handpose.program import forget_sigterm, interrupt_on_sigterm
from handpose.training import interruption
from handpose.training.interruption import interrupt_between_batches


@pytest.fixture
def trainer():
    """A Trainer's list of callbacks, in a process that treats both signals like Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with interrupt_on_sigterm():
        forget_sigterm()
        yield SimpleNamespace(callbacks=["another"])
    signal.signal(signal.SIGINT, before)


def send(number):
    os.kill(os.getpid(), number)


def run(trainer, *steps):
    """Run steps as a training; return how many were run before KeyboardInterrupt, or None if it was not raised."""
    done = 0
    try:
        with interrupt_between_batches(trainer):
            for step in steps:
                step()
                done += 1
    except KeyboardInterrupt:
        return done
    return None


def begin_batch(trainer, hook="on_train_batch_start"):
    return lambda: getattr(trainer.callbacks[0], hook)(trainer, None, None, 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start", "on_predict_batch_start"])
def test_a_batch_is_finished_and_the_next_one_does_not_begin(trainer, number, hook):
    begin = begin_batch(trainer, hook)
    assert run(trainer, begin, lambda: send(number), lambda: "its rest", begin, lambda: "the next one") == 3
    assert trainer.callbacks == ["another"]


def test_it_is_not_lost_if_no_batch_follows(trainer):
    assert run(trainer, lambda: send(signal.SIGINT)) == 1


def test_a_batch_that_never_ends_is_interrupted(trainer, monkeypatch):
    monkeypatch.setattr(interruption, "_PATIENCE_S", 0.05)
    begun = time.monotonic()
    assert run(trainer, lambda: send(signal.SIGINT), lambda: time.sleep(20.0)) == 1
    assert time.monotonic() - begun < 10.0


def test_the_second_time_it_takes_effect_at_once(trainer):
    assert run(trainer, lambda: send(signal.SIGINT), lambda: send(signal.SIGINT), lambda: "it goes on") == 1


def test_scancel_repeats_sigterm_and_the_repeat_changes_nothing(trainer):
    twice = [lambda: send(signal.SIGTERM)] * 2
    assert run(trainer, *twice, lambda: "the rest of the batch", begin_batch(trainer)) == 3


def test_the_handlers_are_those_of_before_and_no_alarm_is_left(trainer):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    assert run(trainer, lambda: send(signal.SIGINT)) == 1
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_that_is_ignored_stays_ignored(trainer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    assert run(trainer, lambda: send(signal.SIGINT), begin_batch(trainer)) is None
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_another_thread_changes_nothing(trainer):
    def use():
        with interrupt_between_batches(trainer):
            seen.append(list(trainer.callbacks))

    seen = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [["another"]]


class InterruptedMutex:
    """The lock of a queue: Ctrl-C comes just when it has been taken, as it can if another thread uses the queue too."""

    def __init__(self):
        self.lock, self.is_due = threading.Lock(), True
        self.acquire, self.release, self._is_owned = self.lock.acquire, self.lock.release, self.lock.locked

    def __enter__(self):
        self.lock.__enter__()
        if self.is_due:
            self.is_due = False
            send(signal.SIGINT)

    def __exit__(self, *error):
        self.lock.__exit__(*error)


@pytest.mark.parametrize("is_held", [False, True])
def test_the_lock_of_a_queue_is_given_back(trainer, is_held):
    """Without the block, Python leaves the queue locked for ever."""
    values = queue.Queue()
    values.mutex = InterruptedMutex()
    values.not_full, values.not_empty = threading.Condition(values.mutex), threading.Condition(values.mutex)
    if is_held:
        assert run(trainer, lambda: values.put(1), begin_batch(trainer)) == 1
    else:
        with pytest.raises(KeyboardInterrupt):
            values.put(1)
    assert values.mutex.lock.locked() == (not is_held)
