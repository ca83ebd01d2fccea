"""A searcher that uses no Optuna sampler, as a user might add it: one Python file and one YAML file."""

import random

from handpose.errors import UserError
from handpose.search.distributions import count_values, get_value_at
from handpose.search.searcher import Searcher
from handpose.search.space import YamlSpace


class LocalSearcher(Searcher):
    """Random search that then changes one parameter of the best trial so far."""

    def __init__(self, *, space, seed, mode, num_random):
        if not isinstance(space, YamlSpace):
            raise UserError(f"searcher=local needs a YAML search space, but got {space.file}")
        self._space, self._seed, self._num_random = space, seed, num_random
        self._sign = 1 if mode == "min" else -1
        self._ended = {}

    def on_trial_update(self, trial):
        if trial.state in ("complete", "stopped") and trial.values:
            self._ended[trial.number] = self._sign * trial.values[max(trial.values)], trial.number, trial.params

    def suggest(self, number):
        generator = random.Random(f"{self._seed} {number}")
        draws = {name: draw(each, generator) for name, each in self._space.parameters.items()}
        params = self._space.build_params(draws)
        if number < self._num_random or not self._ended:
            return params
        _, _, best = min(self._ended.values(), key=lambda trial: trial[:2])
        key = generator.choice(list(draws))
        return {**best, key: params[key]}


def draw(distribution, generator):
    """Draw a value of a distribution."""
    if count := count_values(distribution):
        return get_value_at(distribution, generator.randrange(count))
    low, high, position = distribution.low, distribution.high, generator.random()
    return low * (high / low) ** position if distribution.log else low + (high - low) * position
