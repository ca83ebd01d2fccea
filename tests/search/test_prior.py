"""Priors: how a space file states a belief, its densities against SciPy, and proposals that are drawn from it."""

import math
from functools import partial

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import CmaEsSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler
from scipy import stats

from handpose.config import compose
from handpose.errors import UserError
from handpose.plain_values import to_json_text
from handpose.search.distributions import count_values, get_value_at
from handpose.search.optuna_searcher import OptunaSearcher
from handpose.search.points import draw_trial, find_finite_points, place_values
from handpose.search.prior import Prior, parse_prior
from handpose.search.prior_sampler import (
    PriorSampler,
    compute_prior_probability,
    limit_prior_probability,
    sum_log_densities,
)
from handpose.search.space import fix_params, list_keys
from tests.search.trial_feed import TrialFeed

SPACE = """
optimizer.lr: tag(log, interval(2e-4, 1e-2))
heatmap.sigma: interval(0.01, 0.08)
model.decoder.depth: range(1, 6)
model/decoder: choice(pyramid, effpose)
"""
PRIOR = """
prior:
  optimizer.lr: 0.005 +- factor 3
  heatmap.sigma: 0.04 +- 0.01
  model.decoder.depth: 3
  model/decoder: pyramid
"""
CONDITIONAL = """
def space(trial):
    decoder = trial.suggest_categorical("model/decoder", ["pyramid", "effpose", "third"])
    params = {"model/decoder": decoder, "optimizer.lr": trial.suggest_float("optimizer.lr", 1e-4, 1e-1, log=True)}
    if decoder == "pyramid":
        params["model.decoder.depth"] = trial.suggest_int("model.decoder.depth", 1, 9)
    return params
"""
SAMPLERS = {
    "tpe": partial(TPESampler, n_startup_trials=4, multivariate=True, group=True, constant_liar=True),
    "gp": partial(GPSampler, n_startup_trials=3),
    "cmaes": partial(CmaEsSampler, popsize=4),
    "qmc": partial(QMCSampler, scramble=True, warn_independent_sampling=False),
    "nsga": partial(NSGAIISampler, population_size=4),
    "random": RandomSampler,
}


@pytest.fixture
def make(tmp_path):
    """Makes a searcher, which is closed at the end."""
    made = []

    def build(space, sampler=RandomSampler, *, folder="study", **changes):
        values = {"name": "test", "metric": "m", "mode": "min", "max_epochs": 3, "seed": 0, "defaults": {}}
        searcher = OptunaSearcher(space=space, folder=tmp_path / folder, sampler=sampler, **values | changes)
        made.append(TrialFeed(searcher))
        return made[-1]

    yield build
    for searcher in made:
        searcher.close()


def run(searcher, numbers, loss):
    """Run one trial after the other to its end."""
    asked = []
    for number in numbers:
        asked.append(searcher.suggest(number))
        searcher.on_segment_start(number)
        searcher.on_trial_result(number, 1, loss(asked[-1]))
        searcher.on_trial_end(number, "complete")
    return asked


def is_from_prior(searcher, number):
    return searcher.explain_suggestion(number).startswith("drawn from the prior")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_yaml_file_states_priors(write_space):
    space = write_space(SPACE + PRIOR)
    assert space.priors == {
        "optimizer.lr": Prior(0.005, 3.0, is_factor=True),
        "heatmap.sigma": Prior(0.04, 0.01),
        "model.decoder.depth": Prior(3),
        "model/decoder": Prior("pyramid"),
    }
    plain = write_space(SPACE)
    assert plain.priors == {}
    assert (space.parameters, space.fixed, space.expressions) == (plain.parameters, plain.fixed, plain.expressions)
    assert list_keys(space) == list_keys(plain)


def test_a_python_file_states_priors_in_a_dict(write_space):
    priors = '\nimport numpy as np\nprior = {"optimizer.lr": "0.01 +- factor 2", "model.decoder.depth": np.int64(4)}\n'
    space = write_space(CONDITIONAL + priors, ".py")
    assert space.priors == {"optimizer.lr": Prior(0.01, 2.0, is_factor=True), "model.decoder.depth": Prior(4)}
    assert type(space.priors["model.decoder.depth"].value) is int


@pytest.mark.parametrize(
    ("written", "prior"),
    [
        (3, Prior(3)),
        ("0.1+-0.02", Prior(0.1, 0.02)),
        ("0.1 +/- 2e-2", Prior(0.1, 0.02)),
        ("0.1 ± 0.02", Prior(0.1, 0.02)),
        ("1e-3 +- factor 1.5", Prior(0.001, 1.5, is_factor=True)),
        ("-3 +- 1", Prior(-3, 1.0)),
        ([1, 2], Prior([1, 2])),
    ],
)
def test_a_prior_is_parsed_and_printed(written, prior):
    assert parse_prior("file", written) == prior
    assert parse_prior("file", str(prior)) == prior or prior.spread is None


def test_texts_in_a_yaml_file_are_read_as_other_values_of_the_file_are(write_space):
    space = write_space("a: tag(log, interval(1e-4, 1))\nb: choice('x y', null, 2)\nprior: {a: 1e-3, b: 'null'}")
    assert space.priors == {"a": Prior(0.001), "b": Prior(None)}


def test_a_number_may_stand_for_an_option_that_is_a_text(write_space):
    space = write_space('model.encoder.name: choice("16", "32")\nprior:\n  model.encoder.name: 16\n')
    (prior,) = space.priors.values()
    choices = CategoricalDistribution(("16", "32"))
    assert prior.find_problem(choices) is None
    np.testing.assert_allclose(np.exp(prior.log_density(["16", "32"], choices)), [1.5, 0.5])


@pytest.mark.parametrize(
    ("prior", "reason"),
    [
        ("{optimizer.rl: 0.005}", r"does not search optimizer.rl; did you mean optimizer.lr\?"),
        ("{lr: 0.005}", r"does not search lr; did you mean optimizer.lr\?"),
        ("{qqqq: 0.005}", r"does not search qqqq; it searches optimizer.lr, heatmap.sigma, .*"),
        ("{optimizer.lr: 0.5}", r"optimizer.lr: 0.5: optimizer.lr ranges from 0.0002 to 0.01; give a value in this"),
        ("{optimizer.lr: 0.5 +- factor 2}", r"0.5 \+- factor 2: optimizer.lr ranges from 0.0002 to 0.01"),
        ("{optimizer.lr: .nan}", r"ranges from 0.0002 to 0.01"),
        ("{optimizer.lr: fast}", r"optimizer.lr is a number from 0.0002 to 0.01; write VALUE"),
        ("{optimizer.lr: true}", r"optimizer.lr is a number from"),
        ("{optimizer.lr: 'interval(0.001, 0.002)'}", r"optimizer.lr is a number from"),
        ("{optimizer.lr: 0.005 +-}", r"prior: optimizer.lr: 0.005 \+-: cannot read this prior; write VALUE, VALUE \+-"),
        ("{optimizer.lr: 0.005 +- factor}", r"cannot read this prior; .* as in `optimizer.lr: 0.005 \+- factor 3`"),
        ("{optimizer.lr: 0.005 +- factor 0.5}", r"the factor must be a number above 1, not 0.5"),
        ("{optimizer.lr: 0.005 +- 0}", r"the spread must be a number above 0, not 0"),
        ("{optimizer.lr: 0.005 +- inf}", r"the spread must be a number above 0, not inf"),
        ("{optimizer: {lr: 0.005}}", r"prior: optimizer: .* is not one value; write VALUE"),
        ("{model/decoder: third}", r"model/decoder has no such option; it has pyramid, effpose"),
        ("{model/decoder: 1 +- 2}", r"model/decoder is a choice, which has no spread; .* alone: pyramid, effpose"),
        ("{zero: 0.1 +- factor 2}", r"zero starts at 0, and a factor needs a range above 0; write VALUE \+- NUMBER"),
        ("{trainer.precision: 16-mixed}", r"does not search trainer.precision"),
        ("choice(1, 2)", r"prior must map searched keys to their best values, .* but it is 'choice\(1, 2\)'"),
    ],
)
def test_a_prior_without_meaning_is_refused_in_a_sentence_with_the_file(write_space, prior, reason):
    text = f"{SPACE}zero: interval(0.0, 1.0)\ntrainer.precision: 16-mixed\nprior: {prior}"
    with pytest.raises(UserError, match=reason) as told:
        write_space(text)
    assert "space.yaml: prior" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("prior", "reason"),
    [
        ('{"model.decoder.dept": 3}', r"does not search model.decoder.dept; did you mean model.decoder.depth or"),
        ('{"model.decoder.depth": 10}', r"model.decoder.depth ranges from 1 to 9"),
        ('{"model/decoder": "fourth"}', r"has no such option; it has pyramid, effpose, third"),
        ("[3]", r"prior must map searched keys to their best values"),
    ],
)
def test_a_prior_of_a_python_file_is_checked_too(write_space, prior, reason):
    with pytest.raises(UserError, match=reason) as told:
        write_space(f"{CONDITIONAL}\nprior = {prior}\n", ".py")
    assert "space.py: prior" in str(told.value)


def test_an_empty_prior_is_none(write_space):
    assert write_space(SPACE + "prior: {}").priors == write_space(SPACE + "prior:").priors == {}


def test_no_configuration_key_is_called_prior():
    for program in ("tune", "train"):
        assert "prior" not in compose(program, [])


def test_a_fixed_key_has_no_prior(write_space):
    for space in (
        write_space(SPACE + PRIOR),
        write_space(CONDITIONAL + 'prior = {"optimizer.lr": 0.01, "model/decoder": "third"}', ".py"),
    ):
        assert fix_params(space, {"optimizer.lr": 0.003}).priors.keys() == space.priors.keys() - {"optimizer.lr"}


# --- densities and draws ----------------------------------------------------------------------------------------------


def truncated(prior, low, high, *, is_log):
    """SciPy's distribution of a prior, or of its logarithm."""
    scale = math.log if is_log else float
    deviation = scale(prior.spread)
    ends = ((scale(end) - scale(prior.value)) / deviation for end in (low, high))
    return stats.truncnorm(*ends, loc=scale(prior.value), scale=deviation)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "prior", [Prior(0.3, 0.1), Prior(0.3, 2.0, is_factor=True), Prior(0.9, 5.0), Prior(0.02, 1e-3)]
)
def test_the_density_of_a_number_is_that_of_scipy_relative_to_a_uniform_one(prior, log):
    distribution = FloatDistribution(0.01, 1.0, log=log)
    values = np.linspace(0.01, 1.0, 101)
    if prior.is_factor:
        density = truncated(prior, 0.01, 1.0, is_log=True).logpdf(np.log(values)) - np.log(values)
    else:
        density = truncated(prior, 0.01, 1.0, is_log=False).logpdf(values)
    uniform = stats.loguniform(0.01, 1.0) if log else stats.uniform(0.01, 0.99)
    np.testing.assert_allclose(prior.log_density(values, distribution), density - uniform.logpdf(values), rtol=1e-9)


DISTRIBUTIONS = [
    IntDistribution(1, 5),
    IntDistribution(1, 64, log=True),
    IntDistribution(0, 90, step=15),
    IntDistribution(3, 3),
    FloatDistribution(0.1, 0.9, step=0.2),
    CategoricalDistribution((3, 3.5, "bool true", None)),
    CategoricalDistribution((3,)),
]


@pytest.mark.parametrize("prior", [Prior(3), Prior(3, 0.01), Prior(3, 2.0), Prior(3, 1.7, is_factor=True)], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_probabilities_of_few_values_sum_to_one_and_draws_have_them(distribution, prior):
    prior = Prior(0.5, prior.spread, prior.is_factor) if isinstance(distribution, FloatDistribution) else prior
    if prior.find_problem(distribution):
        pytest.skip("this prior is refused")
    values = [get_value_at(distribution, index) for index in range(count_values(distribution))]
    uniform = np.full(len(values), 1 / len(values))
    if isinstance(distribution, IntDistribution) and distribution.log:
        uniform = np.diff(np.log(np.arange(0.5, 65))) / math.log(64.5 / 0.5)
    probabilities = np.exp(prior.log_density(values, distribution)) * uniform
    assert probabilities.sum() == pytest.approx(1)
    generator = np.random.default_rng(0)
    drawn = [prior.sample(distribution, generator) for _ in range(3000)]
    counts = np.array([sum(to_json_text(each) == to_json_text(value) for each in drawn) for value in values])
    assert counts.sum() == 3000
    expected = 3000 * probabilities
    assert ((counts - expected) ** 2 <= 16 * np.maximum(expected, 1)).all()  # four standard deviations


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("prior", [Prior(0.3), Prior(0.3, 0.1), Prior(0.3, 2.0, is_factor=True), Prior(1.0, 1e9)])
def test_draws_of_numbers_have_the_density(prior, log):
    distribution = FloatDistribution(0.01, 1.0, log=log)
    generator = np.random.default_rng(0)
    drawn = np.array([prior.sample(distribution, generator) for _ in range(2000)])
    grid = np.exp(np.linspace(math.log(0.01), 0, 4001)) if log else np.linspace(0.01, 1, 4001)
    cumulated = np.cumsum(np.exp(prior.log_density(grid, distribution))) / 4001
    assert cumulated[-1] == pytest.approx(1, abs=2e-3)
    assert stats.kstest(drawn, lambda values: np.interp(values, grid, cumulated)).pvalue > 0.01


def test_two_thirds_of_a_log_normal_belief_lie_within_its_factor():
    distribution = FloatDistribution(1e-9, 1e9, log=True)
    generator = np.random.default_rng(0)
    drawn = [Prior(0.005, 3.0, is_factor=True).sample(distribution, generator) for _ in range(2000)]
    assert np.mean([0.005 / 3 < value < 0.005 * 3 for value in drawn]) == pytest.approx(0.683, abs=0.03)


def test_a_prior_without_a_spread_covers_a_quarter_of_the_range_on_either_side():
    linear, log = FloatDistribution(0.0, 4.0), FloatDistribution(1e-4, 1.0, log=True)
    values = np.linspace(0.1, 3.9, 9)
    assert Prior(2).log_density(values, linear) == pytest.approx(Prior(2, 1.0).log_density(values, linear))
    values = np.logspace(-4, 0, 9)
    assert Prior(0.01).log_density(values, log) == pytest.approx(
        Prior(0.01, 10.0, is_factor=True).log_density(values, log)
    )


def compute_log_density(space, params):
    placed = place_values(space, params)
    return sum_log_densities(space.priors, placed.draws, placed.distributions)


def sample_priors(space, *, seed):
    return draw_trial(space, PriorSampler(RandomSampler(seed=seed), space.priors, seed=seed))[1]


def test_the_density_of_parameters_is_the_product_over_those_with_a_prior(write_space):
    space = write_space(
        "a: interval(0.0, 1.0)\nb: choice(x, y, z)\nc: interval(0.0, 1.0)\nprior: {a: 0.5 +- 0.1, b: y}"
    )
    a = Prior(0.5, 0.1).log_density([0.4], FloatDistribution(0.0, 1.0))[0]
    assert compute_log_density(space, {"a": 0.4, "b": "y", "c": 0.9}) == pytest.approx(a + math.log(2))
    assert compute_log_density(space, {"a": 0.4, "b": "z", "c": 0.1}) == pytest.approx(a + math.log(0.5))


def test_a_conditional_parameter_counts_only_where_it_exists(write_space):
    space = write_space(CONDITIONAL + 'prior = {"model.decoder.depth": 9, "model/decoder": "pyramid"}', ".py")
    without = compute_log_density(space, {"model/decoder": "third", "optimizer.lr": 0.01})
    assert without == pytest.approx(math.log(0.5))
    deep = {"model/decoder": "pyramid", "optimizer.lr": 0.01, "model.decoder.depth": 9}
    assert compute_log_density(space, deep) > compute_log_density(space, deep | {"model.decoder.depth": 2})
    drawn = [sample_priors(space, seed=seed) for seed in range(200)]
    pyramids = [params for params in drawn if params["model/decoder"] == "pyramid"]
    assert len(pyramids) / 200 == pytest.approx(2 / 3, abs=0.12)
    assert np.mean([params["model.decoder.depth"] for params in pyramids]) > 6


def test_where_a_conditional_range_does_not_contain_the_value_another_sampler_draws(write_space):
    text = """
def space(trial):
    kind = trial.suggest_categorical("kind", ["low", "high"])
    low, high = (0, 1) if kind == "low" else (5, 6)
    return {"kind": kind, "x": trial.suggest_float("x", low, high)}
prior = {"x": 5.5}
"""
    space = write_space(text, ".py")
    assert compute_log_density(space, {"kind": "low", "x": 0.5}) == 0
    assert {params["kind"] for seed in range(20) if (params := sample_priors(space, seed=seed))} == {"low", "high"}


# --- proposals --------------------------------------------------------------------------------------------------------


def test_the_probability_falls_with_the_results_and_depends_on_where_the_best_ones_are():
    compute = partial(compute_prior_probability, initial=0.2)
    right, wrong = [1.0] * 9, [-3.0] * 9
    assert compute([]) == 0.2
    assert compute([1.0]) > 0.2 > compute([0.0]) > compute([-1.0])
    assert compute(wrong) < 0.1 * compute(right)
    assert compute([1.0] * 3 + wrong) > 2 * compute(wrong + [1.0] * 3)
    assert compute(right * 100) < 0.01
    assert compute([1e9]) == compute([2.0])
    assert compute([-math.inf]) == 0
    for initial in (0.2, 1.0):
        for num in range(20):
            limit = limit_prior_probability(num, initial=initial)
            assert compute_prior_probability([9.0] * num, initial=initial) <= limit * (1 + 1e-12) <= 1 + 1e-12


@pytest.mark.parametrize("name", SAMPLERS)
def test_proposals_with_a_prior_are_closer_to_it(make, write_space, name):
    """With a probability of one half, for every sampler."""
    text = "optimizer.lr: tag(log, interval(1e-5, 1e-1))\nmodel.decoder.depth: range(1, 10)\n"
    prior = "prior: {optimizer.lr: 1e-2 +- factor 1.5, model.decoder.depth: 7 +- 1}"

    def measure(space, folder):
        searcher = make(space, SAMPLERS[name], folder=folder, seed=1, prior_probability=0.5)
        asked = [searcher.suggest(number) for number in range(24)]
        return np.mean([abs(math.log10(each["optimizer.lr"]) + 2) for each in asked]), searcher

    without, _ = measure(write_space(text), "without")
    distance, searcher = measure(write_space(text + prior), "with")
    assert distance < 0.75 * without
    assert searcher.explain_suggestion(0) == "the most probable configuration of the prior"
    assert 6 <= sum(is_from_prior(searcher, number) for number in range(1, 24)) <= 18


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_a_prior_or_with_probability_zero_nothing_changes(make, write_space, name):
    text = "a: interval(0.0, 1.0)\nb: range(1, 10)\n"
    asked = []
    for folder, prior, options in [
        ("none", "", {}),
        ("none_at_one", "", {"prior_probability": 1.0}),
        ("off", "prior: {a: 0.3}", {"prior_probability": 0.0}),
    ]:
        searcher = make(write_space(text + prior), SAMPLERS[name], folder=folder, **options)
        asked.append(
            (run(searcher, range(10), lambda params: params["a"]), [*map(searcher.explain_suggestion, range(10))])
        )
    assert asked[0] == asked[1] == asked[2]


def test_parameters_without_a_prior_come_from_the_searcher(make, write_space):
    text = "a: interval(0.0, 1.0)\nb: interval(0.0, 1.0)\n"
    space, plain = write_space(text + "prior: {a: 0.9 +- 0.01}"), write_space(text)
    with_prior = make(space, folder="with", prior_probability=1.0)
    without = make(plain, folder="without")
    asked, others = with_prior.suggest(0), without.suggest(0)
    assert asked["a"] == 0.9
    assert asked["b"] != asked["a"]
    assert others.keys() == asked.keys()
    found = [with_prior.suggest(number) for number in range(1, 20)]
    assert all(abs(each["a"] - 0.9) < 0.1 for each in found)
    assert np.std([each["b"] for each in found]) > 0.2
    assert with_prior.explain_suggestion(5) == "drawn from the prior of a"


def test_a_wrong_prior_is_drawn_from_less_often_than_a_right_one(make, write_space):
    text = "a: interval(0.0, 1.0)\nb: interval(0.0, 1.0)\n"
    counts = []
    for value in (0.1, 0.9):
        space = write_space(f"{text}prior: {{a: {value} +- 0.1, b: {value} +- 0.1}}")
        searcher = make(space, SAMPLERS["tpe"], folder=str(value))
        run(searcher, range(40), lambda params: params["a"] ** 2 + params["b"] ** 2)
        counts.append(sum(is_from_prior(searcher, number) for number in range(40)))
    assert counts[0] >= 2 * counts[1]


def test_a_prior_whose_trials_fail_is_given_up(make, write_space):
    searcher = make(write_space("a: interval(0.0, 1.0)\nprior: {a: 0.9 +- 0.01}"))
    for number in range(40):
        params = searcher.suggest(number)
        searcher.on_segment_start(number)
        if params["a"] < 0.8:
            searcher.on_trial_result(number, 1, params["a"])
        searcher.on_trial_end(number, "complete" if params["a"] < 0.8 else "diverged")
    assert sum(is_from_prior(searcher, number) for number in range(10, 40)) <= 1


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("loses_study", [False, True])
def test_a_resumed_sweep_proposes_the_same(make, write_space, tmp_path, name, loses_study):
    """Also if the study is lost and restored from snapshots, which do not say which trials came from the prior."""
    space = write_space("a: interval(0.0, 1.0)\nb: range(1, 30)\nprior: {a: 0.3 +- 0.1, b: 20}")
    prior = {"prior_probability": 0.5}
    whole = make(space, SAMPLERS[name], folder="whole", seed=3, **prior)
    expected = run(whole, range(12), lambda params: params["a"])
    first = make(space, SAMPLERS[name], folder="parts", seed=3, **prior)
    asked = run(first, range(6), lambda params: params["a"])
    snapshots = list(first.snapshots.values())
    first.close()
    if loses_study:
        if name in ("cmaes", "nsga", "qmc"):
            pytest.skip("this sampler keeps a state in the trials of the study, with or without priors")
        (tmp_path / "parts" / "journal.log").unlink()
    second = make(space, SAMPLERS[name], folder="parts", seed=3, resume=True, **prior)
    second.restore_trials(snapshots)
    assert asked + run(second, range(6, 12), lambda params: params["a"]) == expected
    assert any(is_from_prior(whole, number) for number in range(1, 12))


def test_the_most_probable_point_comes_after_the_points_to_try_first(make, write_space):
    space = write_space("a: interval(0.0, 1.0)\nb: range(0, 10, 3)\nc: choice(x, y)\nprior: {a: 0.3, b: 4.4 +- 1}")
    searcher = make(space, defaults={"a": 0.5, "b": 0, "c": "y"}, points_to_evaluate=[{"a": 0.7}])
    assert [searcher.suggest(number) for number in range(3)] == [
        {"a": 0.5, "b": 0, "c": "y"},
        {"a": 0.7, "b": 0, "c": "y"},
        {"a": 0.3, "b": 3, "c": "y"},
    ]
    assert searcher.explain_suggestion(2) == "the most probable configuration of the prior"


def test_in_a_finite_space_no_configuration_is_repeated(make, write_space):
    space = write_space("a: range(0, 4)\nb: choice(x, y)\nprior: {a: 2 +- 0.1, b: x}")
    searcher = make(space, prior_probability=1.0)
    asked = run(searcher, range(8), lambda params: params["a"])
    assert len({to_json_text(params) for params in asked}) == 8 == find_finite_points(space).num_points


def test_a_conditional_space_with_a_constraint_is_searched(make, write_space):
    space = write_space(CONDITIONAL + 'prior = {"model.decoder.depth": "8 +- 1", "model/decoder": "pyramid"}', ".py")
    searcher = make(space, SAMPLERS["tpe"], constraints={"num_parameters": 1e6})
    for number in range(20):
        params = searcher.suggest(number)
        depth = params.get("model.decoder.depth", 1)
        searcher.on_segment_start(number)
        searcher.on_trial_cost(number, {"num_parameters": depth * 2e5})
        if depth <= 5:
            searcher.on_trial_result(number, 1, 1.0 / depth)
        searcher.on_trial_end(number, "complete" if depth <= 5 else "infeasible")
        assert place_values(space, params).params == params
    assert sum(is_from_prior(searcher, number) for number in range(10, 20)) <= 3


@pytest.mark.parametrize("probability", [-0.1, 1.5, math.nan])
def test_a_probability_is_between_0_and_1(make, write_space, probability):
    with pytest.raises(UserError, match=r"searcher.prior_probability must be a number from 0 to 1, or null"):
        make(write_space("a: interval(0.0, 1.0)\nprior: {a: 0.3}"), prior_probability=probability)


def test_a_grid_refuses_a_prior(make, write_space):
    space = write_space("a: range(0, 4)\nprior: {a: 2}")
    with pytest.raises(UserError, match=r"searcher=grid tries every point once, so the prior in .*space.yaml has no"):
        make(space, None)
    assert make(space, None, folder="off", prior_probability=0.0).suggest(0).keys() == {"a"}


def test_results_of_earlier_sweeps_speak_against_a_prior_as_own_ones_do(make, write_space):
    """The probability counts all trials in the study, and imported ones are among them."""
    space = write_space("a: interval(0.0, 1.0)\nprior: {a: 0.9 +- 0.05}")
    searcher = make(space)
    run(searcher, range(1), lambda params: 1.0)
    storage, study_id = searcher.study._storage, searcher.study._study_id
    for value in np.linspace(0, 0.5, 60):
        trial = optuna.trial.create_trial(
            params={"a": value}, distributions={"a": FloatDistribution(0.0, 1.0)}, value=float(value)
        )
        storage.create_new_trial(study_id, trial)
    again = make(space, resume=True)
    again.restore_trials([])
    assert not any(is_from_prior(again, number) for number in range(61, 70) if again.suggest(number))


def test_the_sampler_of_the_prior_asks_the_other_one_for_the_rest():
    study = optuna.create_study(sampler=PriorSampler(RandomSampler(seed=0), {"a": Prior(0.5, 1e-6)}, seed=0))
    trial = study.ask({"a": FloatDistribution(0.0, 1.0), "b": FloatDistribution(0.0, 1.0)})
    other = optuna.create_study(sampler=RandomSampler(seed=0)).ask({"b": FloatDistribution(0.0, 1.0)})
    assert trial.params["a"] == pytest.approx(0.5, abs=1e-4)
    assert trial.params["b"] == other.params["b"]
