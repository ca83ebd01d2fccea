"""A retraining that fails: the result of the trials is reported all the same."""

import contextlib
from types import SimpleNamespace

import pytest

from handpose.errors import UserError
from handpose.sweep.analysis.report import REPORT_FILE
from tests.sweep.whole_sweep import WholeSweep
from tune import run_steps


def test_the_report_is_written_before_the_error(tmp_path, capsys):
    whole = WholeSweep(tmp_path / "sweep", "sweep.num_trials=4", "sweep.retrain=true").run()
    sent = []

    def retrain_winner(winner, table):
        raise UserError("no epoch gave a finite val/pa_mpjpe_mm")

    clock = SimpleNamespace(enter=lambda stage: None, start_saving=lambda: None, is_limited=False)
    plan = SimpleNamespace(
        clock=clock,
        run_sweep=lambda **_: contextlib.nullcontext(whole.table),
        describe_spent_budget=lambda table: "",
        confirm_finalists=lambda table, **_: None,
        retrain_winner=retrain_winner,
        **{name: getattr(whole, name) for name in ("sweep", "task", "recipe", "origin")},
    )
    notifier = SimpleNamespace(send=lambda *message: sent.append(message))
    with pytest.raises(UserError, match="no epoch gave a finite"):
        run_steps(plan, None, contextlib.ExitStack(), notifier)
    assert (whole.folder / REPORT_FILE).stat().st_size > 10_000
    assert "winner      trial" in capsys.readouterr().out
    assert not sent
