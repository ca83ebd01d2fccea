"""Signals that end a sweep: the first one lets it end in order, repeats of it do nothing, and a second one ends it."""

import signal

import pytest

from handpose import program
from handpose.program import exit_on_user_error
from handpose.sweep.driver import shutdown
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
