"""What all programs have in common: the command line, warnings and signals."""

import os
import signal
import subprocess
import sys

import pytest
import yaml

from handpose import program
from handpose.program import exit_on_user_error, run_script


def test_the_printed_configuration_has_the_values_of_best_yaml(tmp_path, monkeypatch, capsys):
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump({"overrides": ["model.decoder.depth=2", "optimizer.lr=0.5"]}))
    monkeypatch.setattr(sys, "argv", ["train.py", f"best={path}", "optimizer.lr=0.25", "--cfg", "job"])
    run_script("train", lambda _: pytest.fail("--cfg only prints"))
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["decoder"]["depth"], printed["optimizer"]["lr"]) == (2, 0.25)


def test_a_script_warns_of_a_former_name_and_names_the_new_one(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune.py", "sweep.explosion_factor=5", "sweep.num_trials=7"])
    composed = []
    run_script("tune", composed.append)
    assert (composed[0].sweep.divergence_factor, composed[0].sweep.num_trials) == (5, 7)
    warning = "warning: sweep.explosion_factor has been renamed to sweep.divergence_factor; use the new name\n"
    assert capsys.readouterr().err == warning


def test_sigterm_ends_a_program_with_one_line_like_ctrl_c(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, exit_on_user_error():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before


def save_after_sigterm(saved):
    """A program that saves after a SIGTERM, and gets another one meanwhile."""
    with exit_on_user_error():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            saved.append("all")


def test_a_sigterm_that_repeats_another_one_does_not_interrupt_the_saving(capsys):
    """scancel signals all processes of a job, and the job passes the signal on."""
    saved = []
    with pytest.raises(SystemExit) as left:
        save_after_sigterm(saved)
    assert (left.value.code, saved) == (130, ["all"])


def test_a_sigterm_long_after_another_one_interrupts(monkeypatch):
    monkeypatch.setattr(program, "_REPEAT_S", 0.0)
    saved = []
    with pytest.raises(SystemExit):
        save_after_sigterm(saved)
    assert saved == []


def test_an_existing_handler_of_sigterm_is_kept():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with exit_on_user_error():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_a_reader_that_has_enough_ends_a_program_without_a_traceback():
    """As `| head` does."""
    code = "import handpose.program as p\nwith p.exit_on_user_error():\n    [print('a line') for _ in range(100_000)]"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
