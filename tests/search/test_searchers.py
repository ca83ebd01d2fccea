"""What every searcher promises: each file in configs/searcher, with the options it gives, and a searcher of a user."""

import inspect
import shutil
import zlib
from dataclasses import replace
from functools import cache, partial

import pytest
from hydra.utils import instantiate

from handpose import config_files
from handpose.config import compose
from handpose.config_files import CONFIGS, extension_configs
from handpose.errors import UserError
from handpose.plain_values import to_json_text
from handpose.schema import bind_arguments
from handpose.search.points import place_values
from handpose.search.searcher import count_points
from handpose.sweep.audit import audit as audit_module
from handpose.sweep.plan import build_plan
from handpose.sweep.preflight.checks import DataSummary
from tests.search.local_searcher import LocalSearcher
from tests.search.trial_feed import TrialFeed
from tests.sweep.whole_sweep import WholeSweep

FILES = sorted(file.stem for file in ((extension_configs() or CONFIGS) / "searcher").glob("*.yaml"))
SPACES = {
    "numbers": ("optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel.decoder.depth: range(1, 6)\n", ".yaml"),
    "finite": ("optimizer.lr: choice(0.1, 0.01, 0.001)\nmodel.decoder.depth: range(1, 6)\n", ".yaml"),
    "conditional": (
        "def space(trial):\n"
        "    lr = trial.suggest_float('optimizer.lr', 1e-5, 1e-1, log=True)\n"
        "    deep = {'model.decoder.depth': trial.suggest_int('model.decoder.depth', 1, 5)} if lr < 0.05 else {}\n"
        "    return {'optimizer.lr': lr} | deep\n",
        ".py",
    ),
}
DEFAULTS = {"optimizer.lr": 0.001, "model.decoder.depth": 3}
END_STATES = ("complete", "stopped", "failed", "diverged", "paused", "infeasible")
NUM_TRIALS = 9


@cache
def configured(name):
    """What the file makes: the class with its options."""
    if name == "local":
        return partial(LocalSearcher, num_random=4)
    return instantiate(compose("tune", [f"searcher={name}"]).searcher)


@pytest.fixture(params=SPACES)
def space(request, write_space):
    return write_space(*SPACES[request.param])


def make_searcher(name, space, folder, *, seed=0, resume=False, **options):
    """Make the searcher as a sweep does. Raises UserError if it refuses the space."""
    count_points(configured(name), space, repeats=False)
    searcher = bind_arguments(
        configured(name),
        space=space,
        defaults=DEFAULTS,
        metric="val/pa_mpjpe_mm",
        mode="min",
        second_objective=None,
        max_epochs=2,
        seed=seed,
        repeats=False,
        name="test",
        folder=folder,
        resume=resume,
        fingerprint=None,
    )(**options)
    return TrialFeed(searcher)


@pytest.fixture(params=[*FILES, "local"])
def make(request, space, tmp_path):
    """Makes the searcher; skips the test if it refuses the space."""
    made = []

    def build(folder="study", **options):
        made.append(make_searcher(request.param, space, tmp_path / folder, **options))
        return made[-1]

    build.configured = configured(request.param)
    try:
        build("probe").close()
    except UserError as error:
        pytest.skip(str(error))
    yield build
    for searcher in made:
        searcher.close()


def run(searcher, numbers, *, times=1):
    """Run trials, two at a time: each ends in another way after the next one has been proposed."""
    asked = []
    for number in numbers:
        asked.append(searcher.suggest(number))
        searcher.on_segment_start(number)
        if number > searcher.first_number:
            for _ in range(times):
                end(searcher, number - 1)
    return asked


def end(searcher, number):
    state = END_STATES[number % len(END_STATES)]
    params = searcher.snapshots[number].params
    searcher.on_trial_cost(number, {"num_parameters": 1e6, "latency_ms": 2.0, "memory_mb": 9.0})
    if state not in ("failed", "infeasible"):
        searcher.on_trial_result(number, 1, float(zlib.crc32(to_json_text(params).encode()) % 1000))
    if state == "diverged":
        searcher.on_trial_result(number, 2, float("nan"))
    (searcher.on_trial_wait if state == "paused" else partial(searcher.on_trial_end, state=state))(number)


@pytest.mark.parametrize("name", [*FILES, "local"])
def test_a_searcher_searches_a_space_or_refuses_it_in_one_sentence(name, write_space, tmp_path):
    refusals = []
    for kind, (text, suffix) in SPACES.items():
        try:
            make_searcher(name, write_space(text, suffix), tmp_path / kind).close()
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) < len(SPACES)
    assert not any("\n" in refusal for refusal in refusals)


def test_proposals_are_points_of_the_space_whatever_becomes_of_the_trials(make, space, capfd):
    searcher = make()
    for params in run(searcher, range(NUM_TRIALS)):
        placed = place_values(space, params)
        assert (placed.out_of_range, placed.missing) == ((), ())
        assert placed.params == params
    searcher.close()
    searcher.close()
    assert capfd.readouterr() == ("", "")


def test_proposals_depend_on_the_seed_and_repeated_snapshots_change_nothing(make):
    asked = run(make("a", seed=5), range(NUM_TRIALS))
    assert run(make("b", seed=5), range(NUM_TRIALS), times=2) == asked
    assert run(make("c", seed=6), range(NUM_TRIALS)) != asked


def test_a_resumed_searcher_proposes_what_an_uninterrupted_one_does(make):
    whole = run(make("whole"), range(NUM_TRIALS))
    for num_before in (0, 1, 4, 7):
        killed = make(f"resumed_{num_before}")
        before = run(killed, range(num_before))
        last = killed.suggest(num_before)  # the process is killed before the proposal becomes an event
        known = [killed.snapshots[number] for number in range(num_before)]
        resumed = make(f"resumed_{num_before}", resume=True)
        resumed.restore_trials(known)
        assert before == whole[:num_before], num_before
        assert last == whole[num_before], num_before
        assert run(resumed, range(num_before, NUM_TRIALS)) == whole[num_before:], num_before


def test_the_number_of_points_is_known_before_and_none_is_proposed_twice(make, space):
    searcher = make()
    known = count_points(make.configured, space, repeats=False)
    assert known is None or known == searcher.num_points
    if searcher.num_points is not None:
        asked = run(searcher, range(searcher.num_points))
        assert len({to_json_text(params) for params in asked}) == searcher.num_points


def test_the_default_comes_first_and_then_the_points_that_the_user_gives(make):
    """For searchers whose constructors have the arguments `defaults` and `first`."""
    arguments = inspect.signature(make.configured.func).parameters
    if not {"defaults", "points_to_evaluate"} <= arguments.keys():
        pytest.skip(f"{make.configured.func.__name__} has no initial points")
    first = {"optimizer.lr": 0.01, "model.decoder.depth": 2}
    assert run(make(points_to_evaluate=[first]), range(2)) == [DEFAULTS, first]


def test_a_grid_over_an_interval_is_refused_before_it_is_made(write_space):
    with pytest.raises(UserError, match="searcher=grid needs a list of values"):
        count_points(configured("grid"), write_space("optimizer.lr: interval(0.1, 1)"), repeats=False)


@pytest.mark.parametrize("made", [partial(dict), LocalSearcher, {"_target_": "tests.search.local_searcher"}])
def test_a_file_that_makes_no_searcher_is_refused_in_one_sentence(write_space, made):
    with pytest.raises(UserError, match=r"must name a subclass of .*Searcher as _target_, with _partial_: true"):
        count_points(made, write_space(*SPACES["finite"]), repeats=False)


def test_a_searcher_receives_only_the_arguments_that_its_constructor_has():
    assert bind_arguments(lambda seed: seed, seed=3, space=None)() == 3
    assert bind_arguments(lambda **given: given, seed=3, space=None)() == {"seed": 3, "space": None}


@pytest.mark.slow
def test_a_whole_sweep_runs_with_a_searcher_of_one_python_and_one_yaml_file(tmp_path, monkeypatch):
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    for module in (config_files, audit_module):
        monkeypatch.setattr(module, "CONFIGS", copy)
    (copy / "searcher" / "local.yaml").write_text(
        "_target_: tests.search.local_searcher.LocalSearcher\n_partial_: true\nnum_random: 2\n"
    )
    sweep = WholeSweep(tmp_path / "sweep", "searcher=local").run(stops=[(4, "interrupted"), (3, None)])
    whole = WholeSweep(tmp_path / "whole", "searcher=local").run()
    assert [row.params for row in sweep.table.rows.values()] == [row.params for row in whole.table.rows.values()]
    assert not audit_module.audit(sweep.finish(retrained=False).folder)
    monkeypatch.setattr("handpose.sweep.plan.summarise_data", lambda config: DataSummary("0123456789abcdef", None))
    monkeypatch.setattr("handpose.sweep.plan.check_loaders", lambda *arguments: None)
    plan = build_plan(replace(sweep.task, origin=None))
    assert isinstance(bind_arguments(plan.searcher, space=plan.task.space, seed=0, mode="min")(), LocalSearcher)
    assert plan.num_points is None
    assert not plan.trial_function.needs_costs
