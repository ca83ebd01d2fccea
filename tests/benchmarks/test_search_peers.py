"""The methods of other packages: valid configurations, a search to its end, and the translation of search spaces."""

import importlib
import math

import numpy as np
import optuna
import pytest

from handpose.config import compose
from handpose.errors import UserError
from handpose.search.points import draw_trial, place_values
from handpose.search.space import load_space

search = importlib.import_module("benchmarks.search")
peers = importlib.import_module("benchmarks.search_peers")

SPACES = ("default", "recipe", "full")


class Surrogate:
    """27 epochs of one second; a loss that the learning rate decides, and a divergence where it is highest."""

    num_epochs = 27

    def predict(self, params):
        levels = np.array([1 + (math.log10(each["optimizer.lr"]) + 2.5) ** 2 for each in params])
        losses = levels[:, None] * (1 + 2 / np.arange(1, 28))
        losses[[each["optimizer.lr"] > 8e-3 for each in params], 1:] = math.inf
        return losses

    def predict_epoch_seconds(self, params):
        return np.ones(len(params))

    def draw_noise(self, rng):
        return np.ones(27)


class World:
    surrogate, targets, best, mean_training_s = Surrogate(), {100: 0.0, 400: 0.0}, 1.0, 27.0


class Recorded:
    """Passes everything on to a method, and records what it decided."""

    def __init__(self, method):
        self.method, self.params, self.resumed, self.ends, self.epochs = method, [], 0, [], {}

    def next_trial(self):
        found = self.method.next_trial()
        if found is not None and found[1] is not None:
            self.params.append(found[1])
        self.resumed += found is not None and found[1] is None
        return found

    def report(self, trial, epoch, loss):
        decision = self.method.report(trial, epoch, loss)
        self.epochs[trial] = epoch
        if decision != "continue":
            self.ends.append(epoch)
        return decision

    def close(self):
        self.method.close()


def run_search(name, space, *, seed=0, max_trainings=5, num_slots=2):
    task = search.Task(load_space(space), (), 27, num_slots, seed)
    method = Recorded(peers.PEERS[name].make(task))
    search.simulate(World(), method, num_slots=num_slots, start_s=0.1, seed=seed, max_trainings=max_trainings)
    method.close()
    return method


def skip_unless_installed(name):
    for module in peers.PEERS[name].modules:
        pytest.importorskip(module)


def is_in_space(space, params):
    """Whether the space draws these parameters when it is given their values."""
    placed = place_values(space, params)
    return placed.params == params and not placed.out_of_range and not placed.missing


# --- spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPACES)
def test_the_translation_has_each_parameter_exactly_where_the_space_has_it(name):
    space = load_space(name)
    flat = peers.FlatSpace(space)
    sampler = optuna.samplers.RandomSampler(seed=1)
    for trial, params in (draw_trial(space, sampler) for _ in range(500)):
        values = {key: flat.parameters[key].encode(value) for key, value in trial.params.items()}
        # Also with a value for each parameter that this configuration does not have, as those that have a flat space.
        full = {key: each.domain.low for key, each in flat.parameters.items()} | values
        assert {key for key in flat.parameters if flat.is_active(key, full)} == values.keys()
        assert flat.build_params(full) == params


def test_the_conditions_of_the_full_space_are_those_of_its_file():
    flat = peers.FlatSpace(load_space("full"))
    some_depth = peers.Condition("model.decoder.depth", (1, 2, 3, 4, 5))
    assert {key: each.condition for key, each in flat.parameters.items() if each.condition} == {
        "model.decoder.conv": some_depth,
        "model.decoder.skips": some_depth,
        "lr_schedule.flat": peers.Condition("lr_schedule", (1,)),  # the second choice
    }


def test_scales_integers_steps_and_choices_are_kept_and_single_values_are_left_out(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "lr: tag(log, interval(1e-4, 1e-2))\nbatch: tag(int, log, interval(16, 256))\nwidth: range(16, 65, 16)\n"
        "drop: interval(0.0, 0.3)\nkind: choice(a, 1, 2.5)\nonly: choice(7)\nfixed: 64\n"
    )
    flat = peers.FlatSpace(load_space(str(file)))
    assert {key: each.domain for key, each in flat.parameters.items()} == {
        "lr": ("float", 1e-4, 1e-2, True),
        "batch": ("integer", 16, 256, True),
        "width": ("integer", 0, 3, False),
        "drop": ("float", 0.0, 0.3, False),
        "kind": ("choice", 0, 2, False),
    }
    built = flat.build_params({"lr": 1e-2 * (1 + 1e-15), "batch": 17, "width": 2, "drop": 0.1, "kind": np.int64(2)})
    assert built == {"lr": 1e-2, "batch": 17, "width": 48, "drop": 0.1, "kind": 2.5, "only": 7, "fixed": 64}


def load_python_space(folder, body):
    (folder / "space.py").write_text(f"def space(trial):\n{body}")
    return load_space(str(folder / "space.py"))


def test_a_condition_may_have_a_parent_with_a_condition(tmp_path):
    body = """\
    params = {"a": trial.suggest_categorical("a", ["x", "y"])}
    if params["a"] == "y":
        params["b"] = trial.suggest_int("b", 1, 3)
        if params["b"] > 1:
            params["c"] = trial.suggest_float("c", 0.0, 1.0)
    return params
"""
    flat = peers.FlatSpace(load_python_space(tmp_path, body))
    assert flat.parameters["b"].condition == ("a", (1,))
    assert flat.parameters["c"].condition == ("b", (2, 3))
    assert flat.build_params({"a": 0, "b": 3, "c": 0.5}) == {"a": "x"}
    assert not flat.is_active("c", {"a": 0, "b": 3})


def test_a_range_that_depends_on_a_draw_is_refused(tmp_path):
    body = '    a = trial.suggest_int("a", 1, 3)\n    return {"a": a, "b": trial.suggest_int("b", 1, a)}\n'
    with pytest.raises(ValueError, match="fixed ranges, but b is drawn from"):
        peers.FlatSpace(load_python_space(tmp_path, body))


def test_a_condition_on_two_parameters_is_refused(tmp_path):
    body = """\
    params = {"a": trial.suggest_int("a", 0, 1), "b": trial.suggest_int("b", 0, 1)}
    if params["a"] + params["b"] == 2:
        params["c"] = trial.suggest_float("c", 0.0, 1.0)
    return params
"""
    with pytest.raises(ValueError, match="c does not exist in every configuration"):
        peers.FlatSpace(load_python_space(tmp_path, body))


# --- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name in peers.PEERS if "GP" not in name])
def test_a_peer_proposes_configurations_of_the_space_and_trains_some_longer_than_others(name):
    skip_unless_installed(name)
    found = run_search(name, "default")
    assert all(is_in_space(load_space("default"), params) for params in found.params)
    assert len({str(params) for params in found.params}) > 4
    # The brackets of SMAC and the trials of PASHA and DyHPO are not complete after so short a search.
    assert max(found.epochs.values()) >= (3 if "SMAC" in name or "0.14" in name else 27)
    assert min(found.ends) == 1
    assert found.params[0]["optimizer.lr"] != pytest.approx(math.sqrt(2e-4 * 1e-2))  # the middle of the range


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["Syne Tune: ASHA", "SMAC: MultiFidelityFacade", "NePS: ASHA", "Ray: BOHB"])
def test_each_package_proposes_configurations_of_each_space(name, space):
    skip_unless_installed(name)
    found = run_search(name, space, max_trainings=2)
    assert found.params
    assert all(is_in_space(load_space(space), params) for params in found.params)


@pytest.mark.parametrize("scheduler", ["asha", "fifo"])
def test_our_method_does_not_begin_with_the_default_configuration(scheduler):
    task = search.Task(load_space("default"), (), 9, 1, 0)
    method = importlib.import_module("benchmarks.search_methods").OurMethod(task, f"scheduler={scheduler}")
    _, params = method.next_trial()
    method.close()
    assert params["optimizer.lr"] != compose("tune", []).optimizer.lr


def test_methods_without_their_package_are_left_out_unless_they_are_named(monkeypatch, capsys):
    missing = peers.Peer(lambda task: None, ("no_such_module.of_this_name",))
    monkeypatch.setitem(peers.PEERS, "missing", missing)
    monkeypatch.setattr(search, "METHODS", ["random", "missing"])
    assert search.select_methods(None) == ["random"]
    assert capsys.readouterr().out.count("\n") == 2  # one line, and an empty one
    with pytest.raises(UserError, match=r"missing cannot run, .* see requirements-benchmarks\.txt"):
        search.select_methods(["random", "missing"])
    assert search.select_methods(["random"]) == ["random"]
