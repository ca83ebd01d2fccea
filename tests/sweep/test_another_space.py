"""A sweep whose search space the user has changed, with all its files, and what reads them."""

import json
import shutil
from pathlib import Path

import optuna
import pandas as pd
import pytest
from rich.console import Console

from handpose.config import quote_override
from handpose.errors import UserError
from handpose.report.sections import format_status
from handpose.search.points import place_configuration
from handpose.search.space import parse_space
from handpose.search.study import open_storage_for_reading
from handpose.sweep.analysis.read_sweep import read_sweep
from handpose.sweep.analysis.report import render_report
from handpose.sweep.analysis.status import render_status, summarise_status
from handpose.sweep.audit.audit import audit
from handpose.sweep.driver.resume import load_recorded_task
from handpose.sweep.driver.run import read_finished_table
from handpose.sweep.plan import build_plan
from handpose.sweep.preflight.checks import DataSummary
from handpose.sweep.record.events import EVENTS_FILE, SpaceRecord, TrialSuggested, read_events
from handpose.sweep.record.interventions import InterventionFiles, make_intervention
from handpose.sweep.why import main as why
from handpose.yaml_files import read_yaml
from tests.sweep.whole_sweep import WholeSweep

NARROW = SpaceRecord("narrow.yaml", "optimizer.lr: tag(log, interval(5e-4, 2e-3))\nmodel.decoder.depth: range(2, 5)\n")
CHOICE = SpaceRecord("choice.yaml", "optimizer.lr: choice(1e-3, 2e-3, 5e-3)\nheatmap.sigma: interval(0.03, 0.05)\n")
CODE = SpaceRecord(
    "code.py",
    "def space(trial):\n"
    "    return {'optimizer.lr': 10 ** trial.suggest_float('log_lr', -3.5, -2.5),\n"
    "            'data.batch_size': trial.suggest_categorical('data.batch_size', [16, 32])}\n",
)

pytestmark = pytest.mark.slow


def give(folder, space):
    """Give the command to a sweep."""
    InterventionFiles(folder).write(make_intervention("space", space=space))


def list_suggested(folder):
    """The parameters of all trials, in the order in which they were proposed."""
    return [event.params for event in read_events(folder / EVENTS_FILE) if isinstance(event, TrialSuggested)]


def find_problems(folder):
    return [text for kind in audit(folder) for text in kind if "retrain" not in text]


def is_narrow(params):
    return 5e-4 <= params["optimizer.lr"] <= 2e-3 and params["model.decoder.depth"] in (2, 3, 4)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A sweep of 40 trials that finished; then it got another space and 20 more trials."""
    folder = tmp_path_factory.mktemp("changed") / "sweep"
    sweep = WholeSweep(folder, "scheduler.reduction_factor=2", "sweep.num_trials=40")
    sweep.run().finish(retrained=False)
    first = (folder / "events.jsonl").read_text()
    give(folder, NARROW)
    InterventionFiles(folder).write(make_intervention("trials", limits={"num_trials": 60}))
    sweep.resume().run(stops=[(7, None)])
    sweep.finish(seeds=2, retrained=False)
    assert (folder / "events.jsonl").read_text().startswith(first)
    return folder


def test_the_audit_finds_nothing_wrong(changed):
    assert find_problems(changed) == []


def test_trials_that_are_proposed_later_lie_in_the_new_space(changed):
    suggested = list_suggested(changed)
    assert len(suggested) == 60
    assert all(set(params) == {"optimizer.lr", "heatmap.sigma"} for params in suggested[:40])
    assert all(set(params) == {"optimizer.lr", "model.decoder.depth"} for params in suggested[40:])
    assert all(map(is_narrow, suggested[40:]))


def test_a_value_that_left_the_space_stays_a_result(changed):
    trials = pd.read_csv(changed / "trials.csv").set_index("number")
    assert list(trials.index) == list(range(60))
    assert trials["epochs"].min() >= 1
    record = read_sweep(changed)
    assert {trial.number for trial in record.trials} == set(range(60))
    assert set(record.ranked) & set(range(40))


def test_the_study_shows_its_sampler_the_trials_that_the_new_space_contains(changed):
    storage = open_storage_for_reading(None, changed / "study")
    first, newest = (
        optuna.load_study(study_name=name, storage=storage) for name in ("sweep", "sweep (search space 2)")
    )
    assert [len(first.trials), len(newest.trials)] == [40, 60]
    assert all(set(trial.params) == {"optimizer.lr", "heatmap.sigma"} for trial in first.trials)
    assert not any(trial.params for trial in newest.trials[:40]), "a trial with another sigma is in no narrow space"
    assert all(set(trial.params) == {"optimizer.lr", "model.decoder.depth"} for trial in newest.trials[40:])
    states = [trial.state.name for trial in newest.trials[:40]]
    assert states == [trial.state.name for trial in first.trials]


def test_the_space_of_the_sweep_is_the_newest_one(changed):
    task = load_recorded_task(changed, [])
    assert [space.name for space in task.spaces] == ["sweep_space", "narrow"]
    assert task.space.file == changed / "search_space_2" / "narrow.yaml"
    assert task.space.file.read_text() == NARROW.text
    assert len(list((changed / "search_space").iterdir())) == 1


def test_a_file_of_a_later_space_may_be_missing(changed, tmp_path):
    copy = tmp_path / "sweep"
    shutil.copytree(changed, copy)
    shutil.rmtree(copy / "search_space_2")
    assert load_recorded_task(copy, []).space.name == "narrow"
    sweep = WholeSweep.from_folder(copy)
    sweep.run(0)
    assert (copy / "search_space_2" / "narrow.yaml").read_text() == NARROW.text


def test_the_report_describes_trials_of_both_spaces(changed):
    record = read_sweep(changed)
    assert {each.key for each in record.parameters} == {"optimizer.lr", "model.decoder.depth", "heatmap.sigma"}
    rates = next(each for each in record.parameters if each.key == "optimizer.lr")
    assert (rates.low, rates.high, rates.log) == (1e-4, 1e-2, True)
    assert rates.expression == "tag(log, interval(5e-4, 2e-3))"
    assert all(each.is_conditional == (each.key != "optimizer.lr") for each in record.parameters)
    for parameter in record.parameters:
        for trial in record.trials:
            if parameter.key in trial.params:
                assert 0 <= parameter.to_place(trial.params[parameter.key]) <= 1
    assert {effect.key for each in record.importance for effect in each.effects} >= {"optimizer.lr"}
    (change,) = record.space_changes
    assert (change.name, change.first_trial) == ("narrow.yaml", 40)
    assert change.at_s == pytest.approx(next(each.segments[0].started_s for each in record.trials[40:]), abs=5)
    assert "trials from number 40 on were proposed from narrow.yaml" in format_status(record)
    assert "trials from number 40 on were proposed from narrow.yaml" in render_report(changed)[0]


def test_the_next_space_is_one_of_the_newest_or_there_is_none(changed):
    winner = read_sweep(changed).find_winner()
    _, space = render_report(changed)
    if winner.number < 40:
        assert space is None
    elif space is not None:
        assert "heatmap.sigma" not in space


def test_the_confirmation_and_the_winner_are_made_from_all_trials(changed):
    best = read_yaml(changed / "best.yaml")
    assert best["trial"] is None or best["params"] == list_suggested(changed)[best["trial"]]
    labels = [each["trial"] for each in read_yaml(changed / "confirm" / "confirm.yaml")["candidates"]]
    assert len(labels) >= 2


def test_the_story_and_the_status_say_so(changed, capsys):
    assert why([str(changed), "41"]) in (None, 0)
    assert "proposed" in capsys.readouterr().out
    assert json.loads(json.dumps(summarise_status(changed)))["num_trials"] == 60
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render_status(changed, width=100))
    assert "sweep sweep  ·  narrow" in shown.get()


@pytest.mark.parametrize("spaces", [(CHOICE, NARROW), (CODE, CHOICE), (NARROW, CODE)], ids=lambda each: each[0].name)
def test_choices_ranges_and_code_may_follow_each_other(tmp_path, spaces):
    folder = tmp_path / "sweep"
    sweep = WholeSweep(folder, "scheduler=fifo", "sweep.num_trials=60", slots=1)
    for num_reports, space in zip((80, 80), spaces, strict=True):
        sweep.run(num_reports, last="interrupted")
        give(folder, space)
        sweep.resume()
    sweep.run().finish(retrained=False)
    assert find_problems(folder) == []
    suggested = list_suggested(folder)
    keys = [tuple(params) for params in suggested]
    assert [len(set(keys[place : place + 20])) for place in (0, 20, 40)] == [1, 1, 1]
    for params, record in zip(suggested[20:], [spaces[0]] * 20 + [spaces[1]] * 20, strict=True):
        if record is not CODE:
            space = parse_space(record.text, Path(record.name))
            assert place_configuration(space, params, {}) is not None
        else:
            assert 10**-3.5 <= params["optimizer.lr"] <= 10**-2.5
    record = read_sweep(folder)
    assert record.importance
    for parameter in record.parameters:
        places = [
            parameter.to_place(trial.params[parameter.key]) for trial in record.trials if parameter.key in trial.params
        ]
        assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    render_report(folder)


def test_readers_do_not_run_a_space_in_python(tmp_path):
    folder, trace = tmp_path / "sweep", tmp_path / "it_was_run"
    code = SpaceRecord("code.py", f"from pathlib import Path\nPath({str(trace)!r}).write_text('x')\n{CODE.text}")
    sweep = WholeSweep(folder, "scheduler=fifo", slots=1).run(8, last="interrupted")
    give(folder, code)
    sweep.resume().run().finish(retrained=False)
    assert trace.exists(), "the process that runs the sweep runs it"
    trace.unlink()
    read_sweep(folder)
    render_report(folder)
    summarise_status(folder)
    render_status(folder, width=100)
    assert why([str(folder), "5"]) in (None, 0)
    assert not trace.exists()


def test_what_the_command_line_fixes_is_fixed_in_the_new_space(tmp_path):
    folder = tmp_path / "sweep"
    sweep = WholeSweep(folder, "scheduler=fifo", "heatmap.sigma=0.04", slots=1).run(8, last="interrupted")
    give(folder, CHOICE)
    sweep.resume().run().finish(retrained=False)
    suggested = list_suggested(folder)
    assert suggested[-1]["optimizer.lr"] in (1e-3, 2e-3, 5e-3)
    assert {params["heatmap.sigma"] for params in suggested} == {0.04}
    assert find_problems(folder) == []
    assert read_sweep(folder).fixed == {"heatmap.sigma": 0.04}


def test_a_sweep_with_few_configurations_left_has_fewer_trials(tmp_path):
    folder = tmp_path / "sweep"
    few = SpaceRecord("few.yaml", "optimizer.lr: choice(1e-3, 2e-3)\n")
    sweep = WholeSweep(folder, "scheduler=fifo", "sweep.num_trials=9", slots=1)
    sweep.run(16, last="interrupted")
    give(folder, few)
    sweep.resume().run(stops=[(1, None)])
    sweep.finish(retrained=False)
    suggested = list_suggested(folder)
    assert len(suggested) == 6
    assert sorted(params["optimizer.lr"] for params in suggested[4:]) == [1e-3, 2e-3]
    assert find_problems(folder) == []


def test_a_finished_search_of_a_finite_space_goes_on_in_a_larger_one(tmp_path):
    folder = tmp_path / "sweep"
    sweep = WholeSweep(folder, "scheduler=fifo", "sweep.num_trials=9", space="optimizer.lr: choice(1e-3, 2e-3)\n")
    sweep.run().finish(retrained=False)
    assert len(list_suggested(folder)) == 2
    give(folder, NARROW)
    sweep.resume().run().finish(retrained=False)
    suggested = list_suggested(folder)
    assert len(suggested) == 9
    assert all(map(is_narrow, suggested[2:]))
    assert find_problems(folder) == []


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("searcher=grid",), "searcher=grid tries every configuration"),
        (("scheduler=pbt", "scheduler.perturbation_interval=1"), "PopulationBased cannot go on with another search"),
    ],
)
def test_a_searcher_or_scheduler_that_cannot_go_on_refuses(tmp_path, overrides, sentence):
    folder = tmp_path / "sweep"
    text = "optimizer.lr: choice(1e-3, 2e-3, 3e-3, 4e-3)\nheatmap.sigma: choice(0.03, 0.04)\n"
    sweep = WholeSweep(folder, *overrides, space=text).run(3, last="interrupted")
    give(folder, NARROW)
    sweep.resume().run()
    files = InterventionFiles(folder)
    (name,) = files.list_ids()
    answer = files.read_answer(name)
    assert not answer.is_accepted
    assert sentence in answer.sentence
    assert not Path(folder / "search_space_2").exists()
    assert find_problems(folder) == []


def test_the_configuration_is_checked_as_that_of_a_new_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr("handpose.sweep.plan.summarise_data", lambda config: DataSummary("0123456789abcdef", None))
    monkeypatch.setattr("handpose.sweep.plan.check_loaders", lambda *arguments: None)
    sweep = WholeSweep(tmp_path / "sweep", "report.scientific=heatmap.sigma")
    plan = build_plan(sweep.resume().task)
    for text, sentence in [
        ("optimizer.lrr: interval(0, 1)\nheatmap.sigma: interval(0.03, 0.05)\n", "a.yaml: .*optimizer.lr"),
        ("optimizer.lr: choice(fast, slow)\nheatmap.sigma: interval(0.03, 0.05)\n", "a.yaml: .*fast"),
        ("optimizer.lr: interval(1e-4, 1e-3)\n", "report.scientific=heatmap.sigma is not searched"),
        ("trainer.max_steps: choice(3, 4)\nheatmap.sigma: interval(0.03, 0.05)\n", "max_steps"),
    ]:
        with pytest.raises(UserError, match=sentence):
            plan._check_space(parse_space(text, Path("a.yaml")))
    plan._check_space(parse_space("heatmap.sigma: interval(0.03, 0.05)\n", Path("a.yaml")))


def test_a_plan_searches_the_newest_space_and_begins_with_the_first(changed, monkeypatch):
    monkeypatch.setattr("handpose.sweep.plan.summarise_data", lambda config: DataSummary("0123456789abcdef", None))
    monkeypatch.setattr("handpose.sweep.plan.check_loaders", lambda *arguments: None)
    monkeypatch.setattr("handpose.sweep.plan.run_sweep", lambda run: run)
    run = build_plan(load_recorded_task(changed, [], is_steered=True)).run_sweep()
    assert (run.space.name, run.later_space.name) == ("sweep_space", "narrow")
    history = run.make_history()
    history.replay(read_events(changed / EVENTS_FILE))
    assert history.spaces == [NARROW]
    assert run.load_space(NARROW).parameters == run.later_space.parameters
    assert read_finished_table(changed, run.make_history(), num_points=run.num_points) is not None


def test_the_command_line_that_resumes_names_the_way_to_change_the_space(changed):
    with pytest.raises(UserError, match=r"python -m handpose\.sweep\.control DIR space default"):
        load_recorded_task(changed, ["search_space=default"])


def test_the_audit_finds_a_proposal_that_does_not_come_from_its_space(changed, tmp_path):
    copy = shutil.copytree(changed, tmp_path / "sweep")
    file, later = copy / EVENTS_FILE, "optimizer.lr: tag(log, interval(4e-3, 8e-3))"
    file.write_text(file.read_text().replace("optimizer.lr: tag(log, interval(5e-4, 2e-3))", later))
    found = find_problems(copy)
    assert any("which is not among the values in narrow.yaml" in text for text in found)
    assert not any("trial 39 has" in text for text in found)


def test_the_audit_finds_a_study_that_does_not_follow_the_change(changed, tmp_path):
    copy = shutil.copytree(changed, tmp_path / "sweep")
    file = copy / EVENTS_FILE
    wide = "optimizer.lr: tag(log, interval(1e-4, 1e-2))\nheatmap.sigma: interval(0.03, 0.08)\n"
    file.write_text(file.read_text().replace(json.dumps(NARROW.text), json.dumps(wide)))
    found = find_problems(copy)
    assert any("trial 0 has no draws, although narrow.yaml contains its parameters" in text for text in found)


def test_a_later_sweep_learns_from_the_trials_of_both_spaces(changed, tmp_path):
    text = "optimizer.lr: tag(log, interval(1e-4, 1e-2))\nheatmap.sigma: interval(0.03, 0.08)\n"
    name = f"after_{changed.parent.name}"
    warm = quote_override("searcher.warm_start", [str(changed)])
    default = load_recorded_task(changed, []).defaults["model.decoder.depth"]
    num_default = sum(params.get("model.decoder.depth", default) == default for params in list_suggested(changed))
    assert 40 < num_default < 60
    for more, brought in (("", num_default), ("model.decoder.depth: range(1, 6)\n", 60)):
        after = WholeSweep(tmp_path / f"{name}_{brought}", warm, space=text + more).process(is_new=True)
        (summary,) = after.searcher.warm_start
        assert summary["brought"] == brought
        after.leave("interrupted")
