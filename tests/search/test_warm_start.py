"""What comes from earlier sweeps into a new one: results that compare as results, the best of the others as points."""

import math
from functools import partial

import optuna
import pytest
import yaml
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState

from handpose.errors import UserError
from handpose.search.optuna_searcher import OptunaSearcher
from handpose.search.space import flatten_config
from handpose.search.warm_start import find_used_seeds
from tests.search.trial_feed import TrialFeed

METRIC = "val/pa_mpjpe_mm"
SPACE = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel.decoder.depth: range(1, 6)\n"
CONFIG = {
    "optimizer": {"lr": 0.001, "weight_decay": 0.01},
    "model": {"encoder": {"name": "lcnet_050"}, "decoder": {"depth": 3}},
    "data": {"batch_size": 16, "root": "/data"},
    "trainer": {"max_epochs": 20},
    "seed": 0,
}
CHOICES = {"model/decoder": "pyramid"}


class Sweeps:
    """Sweeps in folders of their own, each with its sweep.yaml and its study, as tune.py leaves them."""

    def __init__(self, folder, write_space):
        self.folder, self.write_space = folder, write_space
        self.searchers = []

    def begin(self, name, *, space=SPACE, config=None, fingerprint="hands", settings=None, suffix=".yaml", **changes):
        """A searcher. config: of the composed configuration what is not CONFIG's, flattened."""
        sweep = {"name": name, "metric": METRIC, "mode": "min", "max_epochs": 9} | (settings or {})
        defaults = flatten_config(CONFIG) | (config or {})
        folder = self.folder / name
        searcher = TrialFeed(
            OptunaSearcher(
                space=self.write_space(space, suffix),
                folder=folder / "study",
                seed=0,
                defaults=defaults | CHOICES,
                fingerprint=fingerprint,
                sampler=changes.pop("sampler", RandomSampler),
                **sweep,
                **changes,
            )
        )
        kept = {"sweep": sweep, "searcher": {"storage": changes.get("storage")}, **defaults}
        record = {"config": kept, "choices": CHOICES, "data_fingerprint": fingerprint, "git": {"revision": "abc"}}
        folder.mkdir(exist_ok=True)
        (folder / "sweep.yaml").write_text(yaml.safe_dump(record | {"folder": str(self.folder)}))
        self.searchers.append(searcher)
        return searcher

    def run(self, name, ends=("complete",) * 4, **settings):
        """A sweep that was run to its end; how each trial ended. Returns its folder."""
        searcher = self.begin(name, **settings)
        for number, state in enumerate(ends, start=searcher.first_number):
            loss = self.loss(searcher.suggest(number))
            for epoch in {"complete": (1, 9), "failed": (), "diverged": (1,)}.get(state, (1, 3)):
                searcher.on_trial_result(number, epoch, loss + 1 / epoch)
            if state == "waiting":
                searcher.on_trial_wait(number)
            elif state != "running":
                searcher.on_trial_end(number, state)
        if "running" not in ends:
            searcher.close()
        return str(self.folder / name)

    @staticmethod
    def loss(params):
        return abs(math.log10(params["optimizer.lr"]) + 3) + params.get("model.decoder.depth", 3) / 10

    def trials(self, path):
        return open_study(path).trials


def open_study(path):
    backend = optuna.storages.journal.JournalFileBackend(f"{path}/study/journal.log")
    (summary,) = optuna.get_all_study_summaries(storage := optuna.storages.JournalStorage(backend))
    return optuna.load_study(study_name=summary.study_name, storage=storage)


@pytest.fixture
def sweeps(tmp_path, write_space):
    sweeps = Sweeps(tmp_path, write_space)
    yield sweeps
    for searcher in sweeps.searchers:
        searcher.close()


def list_results(trials):
    return [(t.state, t.params, t.value, t.intermediate_values) for t in trials]


def get_import_summary(searcher):
    """Of one earlier sweep, what is not nothing."""
    (one,) = searcher.warm_start
    return {key: value for key, value in one.items() if value and key not in ("folder", "sweep")}


def test_results_under_the_same_conditions_count_as_the_sweeps_own(sweeps):
    ends = ["complete", "stopped", "failed", "complete", "waiting", "diverged", "running"]
    path = sweeps.run("before", ends)
    searcher = sweeps.begin("after", warm_start=[path])
    brought = searcher.study.trials
    before = [trial for trial, end in zip(sweeps.trials(path), ends, strict=True) if end not in ("failed", "diverged")]
    expected = [
        (TrialState.COMPLETE if end == "complete" else TrialState.PRUNED, params, values[max(values)], values)
        for end, (_, params, _, values) in zip(
            [end for end in ends if end not in ("failed", "diverged")], list_results(before), strict=True
        )
    ]
    assert list_results(brought) == expected
    assert get_import_summary(searcher) == {"brought": 5, "failed": 2}
    assert searcher.first_number == 5
    assert searcher.suggest(5)
    assert searcher.study.trials[5].number == 5


def test_each_says_where_it_is_from_over_several_sweeps(sweeps):
    first = sweeps.run("first", ["failed", "complete"])
    second = sweeps.run("second", ["complete"], warm_start=[first])
    searcher = sweeps.begin("third", warm_start=[second])
    studies = [open_study(path).user_attrs["id"] for path in (first, second)]
    chained, own = (trial.user_attrs["lineage"] for trial in searcher.study.trials)
    same = {"data": "hands", "revision": "abc"}
    there = {"sweep": "first", "study": studies[0], "number": 1, "folder": first} | same
    assert chained == {"sweep": "second", "study": studies[1], "number": 0, "folder": second, "from": there} | same
    assert own == {"sweep": "second", "study": studies[1], "number": 1, "folder": second} | same


def test_what_was_brought_once_is_not_brought_again(sweeps):
    first = sweeps.run("first", ["complete"] * 3)
    second = sweeps.run("second", ["complete"] * 2, warm_start=[first])
    searcher = sweeps.begin("third", warm_start=[first, first, second, f"{second}/../second"])
    assert [(one["brought"], one["known"]) for one in searcher.warm_start] == [(3, 0), (0, 3), (2, 3), (0, 5)]
    assert len(searcher.study.trials) == 5


def test_the_sampler_learns_from_what_was_brought(sweeps):
    path = sweeps.run("before", ["complete"] * 40)
    tpe = partial(TPESampler, n_startup_trials=20)
    losses = {}
    for name, warm_start in (("cold", []), ("warm", [path])):
        searcher = sweeps.begin(name, warm_start=warm_start, sampler=tpe)
        begin = searcher.first_number + 1  # after the default
        losses[name] = [sweeps.loss(searcher.suggest(number)) for number in range(begin, begin + 20)]
    assert sum(losses["warm"]) < 0.8 * sum(losses["cold"])


def test_a_sweep_that_goes_on_brings_nothing_in_again_though_the_earlier_one_is_gone(sweeps):
    path = sweeps.run("before", ["complete"] * 2)
    sweeps.begin("after", warm_start=[path]).close()
    (sweeps.folder / "before" / "sweep.yaml").unlink()
    again = sweeps.begin("after", warm_start=[path], resume=True)
    assert again.first_number == len(again.study.trials) == 2
    assert get_import_summary(again) == {"brought": 2}


# --- a changed space --------------------------------------------------------------------------------------------------


def test_points_out_of_a_narrower_range_are_dropped_and_counted(sweeps):
    path = sweeps.run("before", ["complete"] * 12)
    searcher = sweeps.begin("after", warm_start=[path], space=SPACE.replace("range(1, 6)", "range(3, 6)"))
    depths = [trial.params["model.decoder.depth"] for trial in sweeps.trials(path)]
    kept = [depth for depth in depths if depth >= 3]
    assert 0 < len(kept) < 12
    assert [trial.params["model.decoder.depth"] for trial in searcher.study.trials] == kept
    assert get_import_summary(searcher) == {
        "brought": len(kept),
        "dropped_out_of_range": {"model.decoder.depth": 12 - len(kept)},
    }
    ranges = {trial.distributions["model.decoder.depth"] for trial in searcher.study.trials}
    assert ranges == {optuna.distributions.IntDistribution(3, 5)}


@pytest.mark.parametrize(("is_fixed", "default"), [(True, 3), (False, 2)])
def test_a_parameter_that_is_searched_no_more_must_have_had_the_value_it_has_now(sweeps, is_fixed, default):
    path = sweeps.run("before", ["complete"] * 12)
    space = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\n" + ("model.decoder.depth: 3\n" if is_fixed else "")
    searcher = sweeps.begin("after", warm_start=[path], space=space, config={"model.decoder.depth": default})
    depths = [trial.params["model.decoder.depth"] for trial in sweeps.trials(path)]
    same = depths.count(default)
    assert 0 < same < 12
    assert get_import_summary(searcher) == {"brought": same, "dropped_out_of_range": {"model.decoder.depth": 12 - same}}
    assert all(trial.params.keys() == {"optimizer.lr"} for trial in searcher.study.trials)


def test_a_parameter_that_is_new_has_the_value_that_was_in_force(sweeps):
    path = sweeps.run("before", ["complete"] * 3, config={"data.batch_size": 32})
    wider = SPACE + "data.batch_size: choice(16, 32, 64)\n"
    searcher = sweeps.begin("after", warm_start=[path], space=wider)
    assert [trial.params["data.batch_size"] for trial in searcher.study.trials] == [32] * 3
    other = sweeps.begin("other", warm_start=[path], space=SPACE + "data.batch_size: choice(8, 16)\n")
    assert get_import_summary(other) == {"dropped_out_of_range": {"data.batch_size": 3}}


def test_a_group_that_is_new_has_the_choice_that_was_in_force(sweeps):
    path = sweeps.run("before", ["complete"] * 2)
    searcher = sweeps.begin("after", warm_start=[path], space=SPACE + "model/decoder: choice(effpose, pyramid)\n")
    assert [trial.params["model/decoder"] for trial in searcher.study.trials] == ["pyramid"] * 2


PYTHON = """
def space(trial):
    params = {"optimizer.lr": trial.suggest_float("optimizer.lr", 1e-5, 1e-1, log=True)}
    if params["optimizer.lr"] < LIMIT:
        params["model.decoder.depth"] = trial.suggest_int("model.decoder.depth", 1, 5)
    return params
"""


def test_conditional_parameters_are_brought_where_they_are_drawn(sweeps):
    always, never = PYTHON.replace("LIMIT", "1"), PYTHON.replace("LIMIT", "0")
    some = PYTHON.replace("LIMIT", "1e-3")
    path = sweeps.run("before", ["complete"] * 12, space=some, suffix=".py")
    deep = ["model.decoder.depth" in trial.params for trial in sweeps.trials(path)]
    assert 0 < sum(deep) < 12
    same = sweeps.begin("same", warm_start=[path], space=some, suffix=".py")
    assert list_results(same.study.trials) == list_results(sweeps.trials(path))
    # Where it was not drawn, the depth was the default's.
    whole = sweeps.begin("whole", warm_start=[path], space=always, suffix=".py")
    depths = [trial.params.get("model.decoder.depth", 3) for trial in sweeps.trials(path)]
    assert [trial.params["model.decoder.depth"] for trial in whole.study.trials] == depths
    none = sweeps.begin("none", warm_start=[path], space=never, suffix=".py")
    assert get_import_summary(none)["brought"] == depths.count(3)


def test_draws_under_other_names_are_brought_into_the_same_space(sweeps):
    text = "def space(trial):\n    return {'optimizer.lr': 10 ** trial.suggest_float('log_lr', -5, -1)}\n"
    path = sweeps.run("before", ["complete"] * 2, space=text, suffix=".py")
    searcher = sweeps.begin("after", warm_start=[path], space=text, suffix=".py")
    assert list_results(searcher.study.trials) == list_results(sweeps.trials(path))
    listed = sweeps.begin("listed", warm_start=[path])
    assert [trial.params["optimizer.lr"] for trial in listed.study.trials] == [
        10 ** trial.params["log_lr"] for trial in sweeps.trials(path)
    ]


# --- other conditions -------------------------------------------------------------------------------------------------

OTHERS = [
    ({"settings": {"max_epochs": 27}}, "its schedule ends at epoch 9"),
    ({"settings": {"folds": 3}}, "it measured the mean over sweep.folds=1, not 3"),
    ({"fingerprint": "other hands"}, "it was trained on other data"),
    ({"fingerprint": None}, "it was trained on other data"),
    ({"settings": {"metric": "val/loss"}}, "it optimised val/pa_mpjpe_mm (min)"),
    ({"settings": {"mode": "max"}}, "it optimised val/pa_mpjpe_mm (min)"),
    ({"config": {"model.encoder.name": "resnet10t"}}, "model.encoder.name was lcnet_050 and is resnet10t"),
    ({"config": {"optimizer.weight_decay": 0.1}}, "optimizer.weight_decay was 0.01 and is 0.1"),
    ({"config": {"loss.depth_weight": 3}}, "loss.depth_weight was not there and is 3"),
    ({"constraints": {"num_parameters": 1e6}}, "num_parameters was not measured"),
]


@pytest.mark.parametrize(("changes", "reason"), OTHERS)
def test_values_under_other_conditions_are_not_brought_but_the_best_points_are_tried_first(sweeps, changes, reason):
    path = sweeps.run("before", ["complete", "stopped", "complete", "complete", "stopped", "failed"])
    searcher = sweeps.begin("after", warm_start=[path], warm_start_points=4, **changes)
    assert searcher.first_number == 0
    assert get_import_summary(searcher) == {"not_comparable": {reason: 5}, "tried_first": 4, "failed": 1}
    # As a winner is selected: the most trained first, and among equals the best.
    whole, stopped = [sweeps.trials(path)[i] for i in (0, 2, 3)], [sweeps.trials(path)[i] for i in (1, 4)]
    ranked = [*sorted(whole, key=lambda t: t.value), *sorted(stopped, key=lambda t: t.value)]
    default = {"optimizer.lr": 0.001, "model.decoder.depth": 3}
    expected = [default, *(trial.params for trial in ranked if trial.params != default)]
    assert [searcher.suggest(number) for number in range(4)] == expected[:4]


def test_results_with_the_same_folds_count_as_the_sweeps_own(sweeps):
    """sweep.yaml has the epochs of a fold, and the searcher those of a complete trial."""
    path = sweeps.run("before", settings={"folds": 3})
    record = yaml.safe_load((sweeps.folder / "before" / "sweep.yaml").read_text())
    record["config"]["sweep"]["max_epochs"] = 3
    (sweeps.folder / "before" / "sweep.yaml").write_text(yaml.safe_dump(record))
    after = sweeps.begin("after", warm_start=[path], settings={"folds": 3})
    assert get_import_summary(after) == {"brought": 4}


def test_a_point_of_an_earlier_sweep_says_which_trial_it_was(sweeps):
    path = sweeps.run("before", ["complete"] * 4)
    searcher = sweeps.begin("after", warm_start=[path], warm_start_points=2, fingerprint="other")
    for number in range(2):
        searcher.suggest(number)
    best = min(sweeps.trials(path)[1:], key=lambda trial: trial.value).number  # trial 0 is the default configuration
    origins = [searcher.explain_suggestion(number) for number in range(2)]
    assert origins == ["the default configuration", f"trial {best} of the earlier sweep before"]


def test_data_that_nobody_knows_compare_with_nothing(sweeps):
    path = sweeps.run("before", ["complete"] * 2, fingerprint=None)
    after = sweeps.begin("after", warm_start=[path], fingerprint=None)
    assert get_import_summary(after) == {"not_comparable": {"it was trained on other data": 2}}


@pytest.mark.parametrize(
    "config",
    [
        {"seed": 1},  # another sample of the same thing
        {"data.root": "/elsewhere", "paths.output": "here", "trainer.max_epochs": 99},
        {"logger.name": "none", "num_threads": 4, "scheduler.grace_period": 2},
    ],
)
def test_what_does_not_change_a_configurations_worth_does_not_matter(sweeps, config):
    path = sweeps.run("before", ["complete"] * 2)
    assert get_import_summary(sweeps.begin("after", warm_start=[path], config=config)) == {"brought": 2}


def test_points_to_try_first_lie_in_the_new_space(sweeps):
    path = sweeps.run("before", ["complete"] * 12)
    space = SPACE.replace("range(1, 6)", "range(4, 9)") + "data.batch_size: choice(32, 64)\n"
    searcher = sweeps.begin("after", warm_start=[path], warm_start_points=12, fingerprint="other", space=space)
    deep = [trial for trial in sweeps.trials(path) if trial.params["model.decoder.depth"] >= 4]
    asked = [searcher.suggest(number) for number in range(len(deep))]
    assert [{name: params[name] for name in deep[0].params} for params in asked] == [
        trial.params for trial in sorted(deep, key=lambda trial: trial.value)
    ]
    assert get_import_summary(searcher)["dropped_out_of_range"] == {"model.decoder.depth": 12 - len(deep)}


@pytest.mark.parametrize("recorded", [None, "min"])  # earlier versions recorded min for every metric
def test_the_best_of_a_sweep_are_those_with_the_largest_area_under_pck(sweeps, recorded):
    path = sweeps.run("before", ["complete"] * 5, settings={"metric": "val/pck_auc", "mode": recorded})
    searcher = sweeps.begin("after", warm_start=[path], warm_start_points=1)  # judged by another metric
    searcher.suggest(0)
    assert searcher.suggest(1) == max(sweeps.trials(path), key=lambda trial: trial.value).params


def test_the_best_of_a_sweep_that_maximised_are_the_largest(sweeps):
    path = sweeps.run("before", ["complete"] * 5, settings={"mode": "max"})
    searcher = sweeps.begin("after", warm_start=[path], warm_start_points=1)
    searcher.suggest(0)
    assert searcher.suggest(1) == max(sweeps.trials(path), key=lambda trial: trial.value).params


def test_constraints_are_judged_anew(sweeps):
    searcher = sweeps.begin("before", constraints={"num_parameters": 4e6})
    for number in range(3):
        searcher.suggest(number)
        searcher.on_trial_cost(number, {"num_parameters": (number + 1) * 1e6, "latency_ms": 3.0})
        searcher.on_trial_result(number, 9, 1.0)
        searcher.on_trial_end(number, "complete")
    searcher.close()
    path = str(sweeps.folder / "before")
    after = sweeps.begin("after", warm_start=[path], constraints={"num_parameters": 2e6})
    assert [trial.constraints for trial in after.study.trials] == [
        {"num_parameters": -0.5},
        {"num_parameters": 0.0},
        {"num_parameters": 0.5},
    ]
    unmeasured = sweeps.begin("unmeasured", warm_start=[path], constraints={"memory_mb": 100})
    assert get_import_summary(unmeasured)["not_comparable"] == {"memory_mb was not measured": 3}
    costly = sweeps.begin(
        "costly", warm_start=[path], fingerprint="other", constraints={"num_parameters": 1e6}, warm_start_points=3
    )
    assert get_import_summary(costly)["tried_first"] == 1


def test_a_second_objective_comes_along_where_it_was_measured_and_depends_on_no_machine(sweeps):
    searcher = sweeps.begin("before")
    for number, end in enumerate(["complete", "stopped", "complete"]):
        searcher.suggest(number)
        if number < 2:
            searcher.on_trial_cost(number, {"num_parameters": (number + 1) * 1e6, "latency_ms": 3.0})
        searcher.on_trial_result(number, 9 if end == "complete" else 1, 1.0 + number)
        searcher.on_trial_end(number, end)
    searcher.close()
    path = str(sweeps.folder / "before")
    after = sweeps.begin("after", warm_start=[path], settings={"second_objective": "num_parameters"})
    assert get_import_summary(after) == {"brought": 2, "not_comparable": {"num_parameters was not measured": 1}}
    assert [(trial.state.name, trial.values) for trial in after.study.trials] == [
        ("COMPLETE", [1.0, 1e6]),
        ("PRUNED", [2.0, 2e6]),
    ]
    back = sweeps.begin("back", warm_start=[str(sweeps.folder / "after")])
    assert [trial.values for trial in back.study.trials] == [[1.0], [2.0]]
    slow = sweeps.begin("slow", warm_start=[path], settings={"second_objective": "latency_ms"}, warm_start_points=0)
    assert get_import_summary(slow) == {"not_comparable": {"latency_ms depends on the machine": 3}}


@pytest.mark.parametrize("cost", ["latency_ms", "memory_mb"])
def test_what_another_machine_measured_is_held_against_no_limit(sweeps, cost):
    searcher = sweeps.begin("before")
    for number in range(3):
        searcher.suggest(number)
        searcher.on_trial_cost(number, {"num_parameters": 1e6, "latency_ms": 3.0, "memory_mb": 3.0})
        searcher.on_trial_result(number, 9, 1.0)
        searcher.on_trial_end(number, "complete")
    searcher.close()
    path = str(sweeps.folder / "before")
    for limit in (1.0, 9.0):  # for the machine that measured them too slow, and fast enough
        name = f"after_{limit}"
        after = sweeps.begin(name, warm_start=[path], constraints={"num_parameters": 2e6, cost: limit})
        assert get_import_summary(after) == {"not_comparable": {f"{cost} depends on the machine": 3}}
    tried = sweeps.begin("tried", warm_start=[path], constraints={cost: 1.0}, warm_start_points=3)
    assert get_import_summary(tried)["tried_first"] == 3
    free = sweeps.begin("free", warm_start=[path], constraints={"num_parameters": 2e6})
    assert get_import_summary(free) == {"brought": 3}
    assert [trial.user_attrs.get(cost) for trial in free.study.trials] == [None] * 3


@pytest.mark.parametrize(("before", "after", "reason"), [(1, 1.0, "was 1 and is 1.0"), (0.5, 0.5, "")])
def test_one_batch_does_not_compare_with_all_batches(sweeps, before, after, reason):
    key = "trainer.limit_train_batches"
    path = sweeps.run("before", ["complete"], config={key: before})
    found = get_import_summary(sweeps.begin("after", warm_start=[path], config={key: after}, warm_start_points=0))
    assert found == ({"not_comparable": {f"{key} {reason}": 1}} if reason else {"brought": 1})


# --- where it is read from --------------------------------------------------------------------------------------------


def test_a_study_in_a_database_is_found(sweeps):
    path = sweeps.run("before", ["complete"] * 2, storage=f"sqlite:///{sweeps.folder}/studies.db")
    assert get_import_summary(sweeps.begin("after", warm_start=[path])) == {"brought": 2}


def test_an_earlier_sweep_is_only_read_even_with_half_a_line_at_its_end(sweeps):
    path = sweeps.run("before", ["complete"] * 2)
    journal = sweeps.folder / "before" / "study" / "journal.log"
    journal.write_bytes(journal.read_bytes() + b'{"op_code":6,"wor')
    before = {file: file.read_bytes() for file in (sweeps.folder / "before").rglob("*") if file.is_file()}
    assert get_import_summary(sweeps.begin("after", warm_start=[path])) == {"brought": 2}
    assert {file: file.read_bytes() for file in (sweeps.folder / "before").rglob("*") if file.is_file()} == before


def write(content):
    return lambda folder: (folder / "sweep.yaml").write_text(content)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "sweep.yaml").unlink(), "is not the folder of a sweep: there is no .*sweep.yaml"),
        (write("{"), "sweep.yaml is damaged, or not the file of a sweep"),
        (write(""), "sweep.yaml is damaged, or not the file of a sweep"),
        (write("config: {sweep: {name: a}}"), "sweep.yaml is damaged, or not the file of a sweep .KeyError: 'metric'."),
        (lambda folder: (folder / "study" / "journal.log").unlink(), "cannot be read: there is no .*journal.log"),
        (lambda folder: (folder / "study" / "journal.log").write_text(""), "cannot be read: there is no study before"),
        (lambda folder: (folder / "study" / "journal.log").write_text("{}\nx\n{}\n"), "the study of .* cannot be read"),
    ],
)
def test_a_folder_that_is_no_sweep_is_one_sentence_before_any_file_is_made(sweeps, damage, sentence):
    path = sweeps.run("before", ["complete"])
    damage(sweeps.folder / "before")
    with pytest.raises(UserError, match=sentence) as told:
        sweeps.begin("after", warm_start=[path])
    assert "\n" not in str(told.value)
    assert not (sweeps.folder / "after").exists()


def test_seeds_of_earlier_sweeps_and_their_confirmations_are_known(tmp_path):
    """They led to what is tried now, so that they cannot confirm it."""
    for name, config in (
        ("first", {"seed": 7, "searcher": {"warm_start": []}}),
        ("second", {"seed": 0, "searcher": {"warm_start": [str(tmp_path / "first"), str(tmp_path / "gone")]}}),
    ):
        (tmp_path / name / "confirm").mkdir(parents=True)
        (tmp_path / name / "sweep.yaml").write_text(yaml.safe_dump({"config": config}))
    (tmp_path / "second" / "confirm" / "confirm.yaml").write_text(yaml.safe_dump({"seeds": [1, 2]}))
    assert find_used_seeds([str(tmp_path / "second")]) == {0, 1, 2, 7}
    assert find_used_seeds([]) == set()
