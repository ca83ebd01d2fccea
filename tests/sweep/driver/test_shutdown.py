"""Signals that end a sweep: the first one lets it end in order, repeats of it do nothing, and a second one ends it."""

import signal
from types import SimpleNamespace

import pytest

from handpose import program
from handpose.program import exit_on_user_error
from handpose.sweep.driver import run, shutdown
from handpose.sweep.driver.shutdown import handle_interrupts
from tests.sweep.sweeps import make_settings


class EndedAtOnceError(Exception):
    """In the place of the end of the process."""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    def end(sweep, why):
        raise EndedAtOnceError(why)

    monkeypatch.setattr(shutdown, "exit_at_once", end)
    return make_settings(tmp_path)


def receive_signals(settings, *numbers):
    with handle_interrupts(settings, lambda: False):
        for number in numbers:
            signal.raise_signal(number)


def test_a_sigterm_that_comes_twice_ends_the_sweep_in_order(settings):
    """As from scancel, which signals the sweep as well as the job, which passes the signal on to the sweep."""
    with handle_interrupts(settings, lambda: False) as is_interrupted:
        assert not is_interrupted()
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            assert is_interrupted()


def test_the_repeat_may_also_come_while_the_sweep_is_copied_to_its_store(settings):
    copied = []
    with exit_on_user_error():
        with handle_interrupts(settings, lambda: False) as is_interrupted:
            signal.raise_signal(signal.SIGTERM)
            assert is_interrupted()
        signal.raise_signal(signal.SIGTERM)
        copied.append("all")
    assert copied == ["all"]


def test_a_later_sigterm_ends_the_sweep_at_once(settings, monkeypatch):
    monkeypatch.setattr(program, "_REPEAT_S", 0.0)
    with pytest.raises(EndedAtOnceError):
        receive_signals(settings, signal.SIGTERM, signal.SIGTERM)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_another_signal_ends_the_sweep_at_once(settings, first):
    with pytest.raises(EndedAtOnceError):
        receive_signals(settings, first, signal.SIGINT)


class NotedSync:
    """A store that notes how it was finished."""

    def __init__(self, error=None):
        self.finished, self.error = [], error

    def finish(self, **how):
        self.finished.append(how)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, OSError("the store does not answer")])
def test_without_ray_a_sweep_is_copied_to_its_store_before_the_process_ends(settings, monkeypatch, error):
    monkeypatch.setattr(run, "exit_at_once", shutdown.exit_at_once)
    folder_sync = NotedSync(error)
    with pytest.raises(EndedAtOnceError, match="no longer answers"):
        run._end_without_ray(SimpleNamespace(sweep=settings, folder_sync=folder_sync, notifier=None))
    assert folder_sync.finished == [{"timeout_s": 0.0, "with_study": False}]
    with pytest.raises(EndedAtOnceError):
        run._end_without_ray(SimpleNamespace(sweep=settings, folder_sync=None, notifier=None))


def test_a_lost_head_is_notified_before_the_process_ends(settings, monkeypatch):
    class Notifier:
        sent, is_closed = [], False

        def send(self, event, text):
            self.sent.append((event, text))

        def close(self):
            self.is_closed = True

    monkeypatch.setattr(run, "exit_at_once", shutdown.exit_at_once)
    notifier = Notifier()
    with pytest.raises(EndedAtOnceError):
        run._end_without_ray(SimpleNamespace(sweep=settings, folder_sync=None, notifier=notifier))
    ((event, text),) = notifier.sent
    assert event == "interrupted"
    assert text.endswith(f"; to resume: python tune.py sweep.resume={settings.resume_path}")
    assert notifier.is_closed
