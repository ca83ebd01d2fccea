"""The whole benchmark, tiny, and continued."""

import importlib
import json

import pytest

expected_errors = importlib.import_module("benchmarks.expected_errors")


@pytest.mark.slow
def test_one_network_and_two_together_on_both_splits(tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures.json"
    arguments = ["--work", str(tmp_path / "work"), "--seeds", "2", "--epochs", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["expected_errors.py", *arguments])
    expected_errors.main()
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert [(row["networks"], row["split"]) for row in rows] == [
        *[("one (mean)", "val"), ("2 together", "val")],
        *[("one (mean)", "test"), ("2 together", "test")],
    ]
    one_on_val = rows[0]
    assert one_on_val["expected_mm"] == pytest.approx(one_on_val["observed_mm"], rel=0.2)  # by the calibration
    assert all(row["gain"] <= row["best_gain"] for row in rows)
    assert capsys.readouterr().out.count("trained seed_") == 2
    expected_errors.main()
    assert "trained" not in capsys.readouterr().out
