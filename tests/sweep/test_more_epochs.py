"""A sweep whose number of epochs the user has raised, with all its files, and what reads them."""

import json

import pandas as pd
import pytest

from handpose.config import quote_override
from handpose.sweep.analysis.read_sweep import read_sweep
from handpose.sweep.analysis.status import summarise_status
from handpose.sweep.audit.audit import audit
from handpose.sweep.record.interventions import InterventionFiles, make_intervention
from handpose.sweep.selection import confirm
from handpose.sweep.why import main as why
from handpose.yaml_files import read_yaml, write_yaml
from tests.sweep.whole_sweep import WholeSweep


@pytest.fixture(scope="module", params=["stop", "promote"])
def raised(request, tmp_path_factory):
    """A sweep of 4 epochs that was finished, and then raised to 9."""
    folder = tmp_path_factory.mktemp("raised") / "sweep"
    sweep = WholeSweep(folder, f"scheduler.mode={request.param}", "scheduler.reduction_factor=2", "sweep.num_trials=12")
    sweep.run().finish()
    first = pd.read_csv(folder / "trials.csv").set_index("number")
    InterventionFiles(folder).write(make_intervention("epochs", limits={"max_epochs": 9}))
    sweep.resume().run()
    sweep.finish(retrained=False)
    return folder, first


def test_the_audit_finds_nothing_wrong(raised):
    folder, _ = raised
    assert [text for kind in audit(folder) for text in kind if "retrain" not in text] == []


def test_trials_that_were_complete_go_on_or_are_compared_at_the_rung_they_had_reached(raised):
    folder, first = raised
    record = read_sweep(folder)
    assert record.max_epochs == 9
    assert record.rungs == (1, 2, 4, 8)
    was_complete = set(first.index[first["state"] == "complete"])
    assert {trial.number for trial in record.trials if trial.epochs > 4} <= was_complete
    assert {trial.epochs for trial in record.trials if trial.number in was_complete} <= {4, 8, 9}
    assert {trial.epochs for trial in record.trials if trial.state == "complete"} == {9}
    ended = [trial for trial in record.trials if trial.number in was_complete and trial.epochs == 4]
    assert {trial.state for trial in ended} <= {"stopped"}


def test_the_winner_has_all_epochs_and_its_command_trains_them(raised):
    folder, _ = raised
    best, trials = read_yaml(folder / "best.yaml"), pd.read_csv(folder / "trials.csv").set_index("number")
    assert trials.loc[best["trial"], "epochs"] == 9
    assert all("trainer.max_epochs=9 " in f"{command} " for command in trials["command"])


def test_the_story_and_the_status_say_so(raised, capsys):
    folder, first = raised
    number = int(first.index[first["state"] == "complete"][0])
    assert why([str(folder), str(number)]) in (None, 0)
    told = capsys.readouterr().out
    assert "complete: trained to sweep.max_epochs=4" in told
    assert "the user has raised sweep.max_epochs from 4 to 9; " in told
    assert json.loads(json.dumps(summarise_status(folder)))["max_epochs"] == 9


def test_the_report_says_so(raised):
    folder, _ = raised
    text = (folder / "report.html").read_text()
    assert "12 of 12 trials" in text
    assert "at most 9 epochs each (at first 4, which the user raised), in" in text


def test_a_sweep_that_learns_from_it_compares_values_after_nine_epochs(raised, tmp_path):
    folder, _ = raised
    for max_epochs, key in ((9, "brought"), (4, "not_comparable")):
        name = f"after_{max_epochs}_{folder.parent.name}"
        warm = quote_override("searcher.warm_start", [str(folder)])
        after = WholeSweep(tmp_path / name, warm, f"sweep.max_epochs={max_epochs}").process(is_new=True)
        (summary,) = after.searcher.warm_start
        assert summary[key]
        after.leave("interrupted")


def test_a_command_line_names_the_way_to_raise_the_epochs(raised):
    folder, _ = raised
    with pytest.raises(Exception, match=r"python -m handpose.sweep.control .* epochs N"):
        WholeSweep.from_folder(folder).resume("sweep.max_epochs=27")


@pytest.mark.parametrize(("epochs", "kept"), [(4, "confirm"), (9, "confirm_1")])
@pytest.mark.parametrize("recorded", [{"epochs": 4}, {}], ids=["recorded", "earlier version"])
def test_a_confirmation_with_fewer_epochs_is_kept_under_another_name(tmp_path, epochs, kept, recorded):
    folder = tmp_path / "confirm"
    folder.mkdir()
    write_yaml(folder / "sweep.yaml", {"confirms": "sweep", **recorded})
    confirm._retire_earlier(folder, max_epochs=epochs, first_max_epochs=4)
    assert [each.name for each in tmp_path.iterdir()] == [kept]


@pytest.mark.parametrize("num_reports", [0, 3])
@pytest.mark.parametrize("mode", ["stop", "promote"])
def test_the_audit_finds_nothing_wrong_right_after_the_command_and_when_the_process_was_killed_then(
    tmp_path, mode, num_reports
):
    """With a confirmation and a winner of fewer epochs, as they are until there are new ones."""
    folder = tmp_path / "sweep"
    sweep = WholeSweep(folder, f"scheduler.mode={mode}", "scheduler.reduction_factor=2", "sweep.num_trials=12")
    sweep.run().finish(seeds=2, retrained=False)
    description = read_yaml(folder / "confirm" / "sweep.yaml")
    write_yaml(folder / "confirm" / "sweep.yaml", {**description, "epochs": 4})
    InterventionFiles(folder).write(make_intervention("epochs", limits={"max_epochs": 9}))
    process = sweep.resume().process()
    process.run(num_reports)
    process.recorder._next_write = 0.0
    process.recorder.refresh()
    assert [text for kind in audit(folder) for text in kind] == []
    process.leave()
    assert [text for kind in audit(folder) for text in kind] == []
