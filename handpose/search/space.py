"""Search spaces: which configuration keys are searched, and over which values.

A space is a file under search_spaces/. A YAML file maps keys to Hydra's sweep expressions, so the syntax is the same as
on the command line (https://hydra.cc/docs/advanced/override_grammar/extended):

    model.decoder.depth: range(1, 6)                    # 1, 2, 3, 4, 5: the end is excluded
    optimizer.lr: tag(log, interval(5e-5, 3e-3))
    data.batch_size: tag(int, log, interval(16, 256))   # integers, both ends included, as in Hydra's Optuna sweeper
    model/decoder: choice(pyramid, effpose)             # a configuration group
    trainer.precision: 16-mixed                         # a plain value is set in every trial

A Python file defines `space(trial: optuna.Trial) -> dict[str, object]` instead (define by run). Its keys may depend on
earlier draws.

Under the key `prior`, a YAML file may say where the best values are believed to lie (handpose/search/prior.py). A
Python file may have a dict of this name.
"""

import contextlib
import difflib
import importlib.util
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import optuna
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from handpose.errors import UserError, join_lines
from handpose.files import expand_home
from handpose.plain_values import is_equal, is_plain, is_same, to_json_text, to_plain
from handpose.schema import find_nearest_keys
from handpose.search.distributions import (
    check_range,
    check_steps,
    count_values,
    fit_value,
    get_value_at,
    make_labels,
    make_stepped_distribution,
    parse_label,
    round_to_distribution,
)
from handpose.search.prior import Prior, parse_prior
from handpose.utf8 import read_utf8
from handpose.yaml_files import parse_yaml

optuna.logging.set_verbosity(optuna.logging.WARNING)  # otherwise Optuna reports every new study on stderr

SPACES_FOLDER = Path(__file__).resolve().parents[2] / "search_spaces"

SPACE_SUFFIXES = (".yaml", ".yml", ".py")

PRIOR_KEY = "prior"
"""The key, or the name in a Python file, of the priors. There is no configuration key of this name."""

Params: TypeAlias = dict[str, Any]
"""Configuration key -> value of one trial; values are scalars or lists of scalars."""


@dataclass(frozen=True)
class YamlSpace:
    """A search space from a YAML file, whose parameters are all known before a trial is drawn.

    Attributes:
        file: the YAML file.
        parameters: key -> distribution, in the order of the file.
        fixed: key -> value of the keys that have the same value in every trial.
        expressions: key -> its text in the file, for messages.
        priors: key -> belief about its best value, of the keys that have one.
    """

    file: Path
    parameters: Mapping[str, BaseDistribution]
    fixed: Mapping[str, Any]
    expressions: Mapping[str, str]
    priors: Mapping[str, Prior] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.file.stem

    def sample(self, trial: optuna.trial.BaseTrial) -> Params:
        """Draw all parameters of a trial.

        Args:
            trial: Optuna's trial, which the values are drawn from.

        Returns:
            Configuration key -> value.
        """
        return self.build_params({key: _sample_param(trial, key, each) for key, each in self.parameters.items()})

    def build_params(self, draws: Params) -> Params:
        """Return the parameters of a trial with these draws, fixed keys included."""
        return {key: self.fixed[key] if key in self.fixed else parse_label(draws[key]) for key in self.expressions}


@dataclass(frozen=True)
class PythonSpace:
    """A search space from a Python file, whose function draws parameters one after the other (define by run).

    Attributes:
        file: the Python file.
        function: the file's `space(trial)`.
        fixed: key -> value of the keys that have this value in every trial instead of the drawn one.
        priors: name -> belief about its best value, of the parameters that have one.
    """

    file: Path
    function: Callable[[Any], Mapping[str, Any]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    priors: Mapping[str, Prior] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.file.stem

    def sample(self, trial: optuna.trial.BaseTrial) -> Params:
        """Draw all parameters of a trial by calling the function of the file.

        Args:
            trial: Optuna's trial, which the values are drawn from.

        Returns:
            Configuration key -> value.

        Raises:
            UserError: the function fails, or does not return a mapping of keys to plain values.
        """
        try:
            params = self.function(_SuggestProxy(trial, self.file, self.fixed))
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.file}: space(trial) raised {type(error).__name__}: {error}") from error
        if not isinstance(params, Mapping):
            raise UserError(f"{self.file}: space(trial) must return a dict of configuration keys, but gave {params!r}")
        params = {key: to_plain(value) for key, value in params.items()}
        for key, value in params.items():
            if not isinstance(key, str) or not is_plain(value):
                raise UserError(
                    f"{self.file}: space(trial) gave {key!r}: {value!r}; values are numbers, text or lists of them"
                )
        return {key: self.fixed.get(key, value) for key, value in params.items()}


Space: TypeAlias = YamlSpace | PythonSpace


def load_space(name: str, *, folder: Path = SPACES_FOLDER) -> Space:
    """Load a search space.

    Args:
        name: the name of a file in `folder` without its suffix, or the path of a file.
        folder: the folder of the search spaces.

    Raises:
        UserError: there is no such space (the message suggests the closest name), or something in the file cannot be
            searched.
    """
    file = find_space(name, folder=folder)
    return _load_python(file, file.read_bytes()) if file.suffix == ".py" else _load_yaml(file, read_utf8(file))


def parse_space(text: str, file: Path) -> Space:
    """Make a search space from the text of its file. The text of a Python file is executed.

    Args:
        text: the text.
        file: the file, for its suffix and for messages. It need not exist.

    Raises:
        UserError: something in the text cannot be searched.
    """
    return _load_python(file, text.encode()) if file.suffix == ".py" else _load_yaml(file, text)


def find_space(name: str, *, folder: Path = SPACES_FOLDER) -> Path:
    """Return the file of a search space, given by name or path. Raises UserError if there is none."""
    path = expand_home(name)
    if path.suffix in SPACE_SUFFIXES or len(path.parts) > 1:
        if path.is_file():
            return path.resolve()
        problem = "is a folder; give a file" if path.is_dir() else "there is no such file"
        raise UserError(f"search_space={name}: {problem}")
    files = {file.stem: file for file in sorted(folder.glob("*")) if file.suffix in SPACE_SUFFIXES}
    if name in files:
        return files[name]
    near = difflib.get_close_matches(name, files, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"search_space={name}: {hint}{folder.name}/ has {', '.join(files) or 'no spaces'}")


def list_keys(space: Space) -> list[str]:
    """List the configuration keys that the space sets; for a Python space, those in `generate_probe_params`."""
    if isinstance(space, YamlSpace):
        return list(space.expressions)
    return list(dict.fromkeys(key for params in generate_probe_params(space) for key in params))


def fix_params(space: Space, fixed: Mapping[str, Any]) -> Space:
    """Return the space with fixed values for some keys, which are then no longer searched.

    Args:
        space: the search space.
        fixed: configuration key -> its value in every trial.

    Raises:
        UserError: nothing is left to search.
    """
    if not fixed:
        return space
    priors = {key: prior for key, prior in space.priors.items() if key not in fixed}
    if isinstance(space, YamlSpace):
        parameters = {key: each for key, each in space.parameters.items() if key not in fixed}
        expressions = {
            key: to_json_text(fixed[key]) if key in fixed else text for key, text in space.expressions.items()
        }
        less: Space = YamlSpace(space.file, parameters, {**space.fixed, **fixed}, expressions, priors)
        is_searched = bool(parameters)
    else:
        less = replace(space, fixed=fixed, priors=priors)
        trial = optuna.create_study(sampler=_ExtremesSampler(upper=False, option=0)).ask()
        less.sample(trial)
        is_searched = bool(trial.params)
    if not is_searched:
        raise UserError(
            f"every key that {space.file} searches is given on the command line ({', '.join(fixed)}), so all "
            "trials would be the same; leave one of them out, or train once with train.py"
        )
    return less


def find_default_point(space: Space, defaults: Mapping[str, Any]) -> Params | None:
    """Return the draws that give the default configuration, or None if the space does not contain it.

    A Python space contains it only if each parameter is drawn under the name of its configuration key.

    Args:
        space: the search space.
        defaults: configuration key -> value of the composed configuration; for a group (`model/decoder`), the chosen
            option.

    Returns:
        Name -> drawn value, as Optuna stores it.
    """
    sampler = GivenValuesSampler(defaults)
    trial = optuna.create_study(sampler=sampler).ask()

    def has_defaults() -> bool:
        return not (sampler.find_out_of_range(trial) or sampler.find_missing(trial))

    try:
        space.sample(trial)
    except UserError:
        if has_defaults():  # otherwise it failed at values other than the defaults
            raise
    return dict(trial.params) if has_defaults() else None


def flatten_config(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration to dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def generate_probe_params(space: Space, *, num_random: int = 3) -> Iterator[Params]:
    """Generate parameters that probe the space.

    First all parameters are at their lower end, then all are at their upper end. The following points have every option
    of every choice (at most the first 100 options), and the last points are random.

    Args:
        space: the search space.
        num_random: the number of random points.
    """
    yield _sample_space(space, _ExtremesSampler(upper=False, option=0))
    yield _sample_space(space, _ExtremesSampler(upper=True, option=-1))
    for option in range(1, 100):
        sampler = _ExtremesSampler(upper=bool(option % 2), option=option)
        params = _sample_space(space, sampler)
        if option >= sampler.num_options - 1:  # the last option was drawn above
            break
        yield params
    random = optuna.samplers.RandomSampler(seed=0)
    yield from (_sample_space(space, random) for _ in range(num_random))


def count_grid_points(space: Space) -> int:
    """Count the points of a grid over the space. Raises UserError if they cannot be listed or are too many."""
    if isinstance(space, PythonSpace):
        raise UserError(f"searcher=grid cannot list the points of {space.file}; use searcher=tpe or random")
    counts = []
    for key, distribution in space.parameters.items():
        count = count_values(distribution)
        if count is None:
            raise UserError(
                f"searcher=grid needs a list of values, but {space.file} has {key}: {space.expressions[key]}; "
                "write range(...) or choice(...), or use searcher=tpe or random"
            )
        counts.append(count)
    total = math.prod(counts)
    if total > _MAX_GRID_POINTS:
        raise UserError(
            f"searcher=grid would list {total} points of {space.file} ({' x '.join(map(str, counts))}), and takes at "
            f"most {_MAX_GRID_POINTS}; make the ranges coarser, or use searcher=tpe or random"
        )
    return total


def list_grid_points(space: Space) -> list[Params]:
    """List every point of the space, as name -> drawn value. Raises UserError as `count_grid_points` does."""
    count_grid_points(space)
    assert isinstance(space, YamlSpace)
    values = [
        [get_value_at(distribution, index) for index in range(count_values(distribution) or 0)]
        for distribution in space.parameters.values()
    ]
    return [dict(zip(space.parameters, point, strict=True)) for point in itertools.product(*values)]


_MAX_GRID_POINTS = 100_000


# --- reading ----------------------------------------------------------------------------------------------------------


def _load_yaml(file: Path, text: str) -> YamlSpace:
    try:
        content = parse_yaml(text, file)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {join_lines(error)}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{file} must map configuration keys to ranges, as in `optimizer.lr: interval(0.0001, 0.01)`")
    content = dict(content)
    written_priors = content.pop(PRIOR_KEY, None)
    parameters: dict[str, BaseDistribution] = {}
    fixed: dict[str, Any] = {}
    for key, value in content.items():
        parsed = _parse_expression(file, str(key), value) if isinstance(value, str) else None
        if parsed is not None and parsed.is_sweep_override():
            parameters[str(key)] = _parse_distribution(file, parsed)
        else:
            fixed[str(key)] = value if parsed is None else _unquote(parsed.value())
            if not is_plain(fixed[str(key)]):
                raise UserError(
                    f"{file}: {key} has the value {value!r}; values are numbers, text or lists of them (write nested "
                    "keys with dots, as optimizer.lr)"
                )
    if not parameters:
        raise UserError(
            f"{file} has nothing to search: every key has one value; give at least one interval, range or choice"
        )
    priors = _parse_priors(file, written_priors, parse_text=partial(_parse_value, file))
    _check_priors(file, priors, {key: [each] for key, each in parameters.items()})
    return YamlSpace(file, parameters, fixed, {str(key): str(value) for key, value in content.items()}, priors)


def _load_python(file: Path, source: bytes) -> PythonSpace:
    spec = importlib.util.spec_from_file_location(f"search_space_{file.stem}", file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        # exec_module would write __pycache__ into the folder of the sweep, and would run it instead of a changed file
        # that has the same size and was written in the same second.
        exec(compile(source, str(file), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    function = getattr(module, "space", None)
    if not callable(function):
        raise UserError(f"{file} must define a function space(trial) that returns a dict of configuration keys")
    space = PythonSpace(file, function, priors=_parse_priors(file, getattr(module, PRIOR_KEY, None)))
    if space.priors:
        _check_priors(file, space.priors, _find_distributions(space))
    return space


def _parse_priors(
    file: Path, written: Any, *, parse_text: Callable[[str, str], Any] = lambda key, text: text
) -> dict[str, Prior]:
    """Parse what a file has under `prior`, or nothing.

    Args:
        file: the file, for the error message.
        written: key -> the prior as it is written.
        parse_text: parses the text of a value without a spread, from its key and the text.
    """
    if not isinstance(written, (Mapping, types.NoneType)):
        raise UserError(
            f"{file}: {PRIOR_KEY} must map searched keys to their best values, as in "
            f"`{PRIOR_KEY}: {{optimizer.lr: 0.005 +- factor 3}}`, but it is {written!r}"
        )
    return {
        str(key): parse_prior(f"{file}: {PRIOR_KEY}: {key}", value, partial(parse_text, str(key)))
        for key, value in (written or {}).items()
    }


def _check_priors(
    file: Path, priors: Mapping[str, Prior], distributions: Mapping[str, Sequence[BaseDistribution]]
) -> None:
    """Check that each prior fits one of the distributions of its parameter.

    Raises:
        UserError: the space does not search the key, or no distribution fits.
    """
    for key, prior in priors.items():
        if key not in distributions:
            near = find_nearest_keys(key, distributions)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it searches {', '.join(distributions)}"
            raise UserError(f"{file}: {PRIOR_KEY}: the space does not search {key}; {hint}")
        problems = [prior.find_problem(distribution) for distribution in distributions[key]]
        if all(problems):
            raise UserError(f"{file}: {PRIOR_KEY}: {key}: {prior}: {key} {problems[0]}")


def _find_distributions(space: PythonSpace) -> dict[str, list[BaseDistribution]]:
    """Return the distributions that draws of a Python space have, at the points that probe it and at its priors."""
    options = range(_NUM_PROBED_OPTIONS)
    samplers: list[optuna.samplers.BaseSampler] = [
        GivenValuesSampler({name: prior.value for name, prior in space.priors.items()}),
        *(_ExtremesSampler(upper=bool(option % 2), option=option) for option in options),
        *(optuna.samplers.RandomSampler(seed=seed) for seed in range(_NUM_RANDOM_PROBES)),
    ]
    found: dict[str, list[BaseDistribution]] = {}
    for sampler in samplers:
        trial = optuna.create_study(sampler=sampler).ask()
        with contextlib.suppress(UserError):  # the space rejects this combination of values
            space.sample(trial)
        for name, distribution in trial.distributions.items():
            if distribution not in found.setdefault(name, []):
                found[name].append(distribution)
    return found


_NUM_PROBED_OPTIONS = 10
_NUM_RANDOM_PROBES = 100


def _parse_expression(file: Path, key: str, expression: str) -> Override:
    try:
        return _parse_override(f"{key}={expression}")
    except (HydraException, OverflowError) as error:
        cause = error.__cause__  # after a grammar error it is the parser's own error, which explains nothing
        reason = str(cause if isinstance(cause, (HydraException, TypeError, ValueError)) else error)
        raise UserError(f"{file}: cannot read {key}: {expression} ({' '.join(reason.split())})") from error


def _parse_value(file: Path, key: str, text: str) -> Any:
    """Parse the text of one value, such as 1e-3 or [1, 2], as Hydra does. A text that is a search range is returned."""
    parsed = _parse_expression(file, key, text)
    return text if parsed.is_sweep_override() else _unquote(parsed.value())


def _parse_override(text: str) -> Override:
    """Parse with Hydra. Its choice(...) rejects null, so such a choice is parsed as a list a, b, c, which allows it."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        listed = re.fullmatch(r"([^=]+=)\s*choice\((.*\bnull\b.*)\)\s*", text)
        if listed is None:
            raise
        return OverridesParser.create().parse_override(listed[1] + listed[2])


def _parse_distribution(file: Path, override: Override) -> BaseDistribution:
    key = override.get_key_element()
    where = f"{file}: {key}: {override.get_value_string()}"
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return _parse_interval(where, sweep)
    if isinstance(sweep, RangeSweep):
        return _parse_range(where, sweep)
    return CategoricalDistribution(tuple(dict.fromkeys(make_labels(_parse_options(where, override, sweep)))))


def _parse_options(where: str, override: Override, sweep: Any) -> list[Any]:
    """Return the options of a choice in the order of the file, since a shuffled order would differ by process."""
    if isinstance(sweep, ChoiceSweep):
        if sweep.tags:
            raise UserError(f"{where}: tag {min(sweep.tags)} is for interval and range, not for choice")
        return [_unquote(value) for value in sweep.list]
    try:
        return [_unquote(value) for value in override.sweep_iterator()]
    except (HydraException, ValueError) as error:
        raise UserError(f"{where}: {join_lines(error)}") from error


def _unquote(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {_unquote(key): _unquote(item) for key, item in value.items()}
    return [_unquote(item) for item in value] if isinstance(value, list) else value


def _parse_interval(where: str, sweep: IntervalSweep) -> BaseDistribution:
    low, high = sweep.start, sweep.end
    log = _is_log(where, sweep.tags)
    assert low is not None
    assert high is not None
    whole = "int" in sweep.tags or (isinstance(low, int) and isinstance(high, int))
    check_range(where, low, high, is_integer=whole)
    if log and (low <= 0 or (whole and low < 1)):
        raise UserError(
            f"{where} is logarithmic, so its low end must be {'at least 1' if whole else 'above 0'}, not {low:g}"
        )
    if not whole:
        return FloatDistribution(float(low), float(high), log=log)
    if low != int(low) or high != int(high):
        raise UserError(f"{where} has the tag int, so its ends must be whole numbers, not {low:g} and {high:g}")
    return IntDistribution(int(low), int(high), log=log)


def _parse_range(where: str, sweep: RangeSweep) -> BaseDistribution:
    start, stop, step = sweep.start, sweep.stop, sweep.step
    assert start is not None
    assert stop is not None
    log = _is_log(where, sweep.tags)
    is_whole = all(isinstance(number, int) for number in (start, stop, step))
    if "int" in sweep.tags and not is_whole:
        raise UserError(f"{where} has the tag int, so its ends and its step must be whole numbers")
    if not all(isinstance(number, int) or math.isfinite(number) for number in (start, stop, step)):
        raise UserError(f"{where} must have finite ends and a finite step")
    if step == 0:
        raise UserError(f"{where}: the step must not be 0")
    if not is_whole:
        check_steps(where, start, stop, step)
    distribution = make_stepped_distribution(start, stop, step)
    if distribution is None:
        raise UserError(f"{where} is empty: a range runs from its start up to, but not including, its end")
    check_range(where, distribution.low, distribution.high, is_integer=is_whole)
    if not log:
        return distribution
    if not isinstance(distribution, IntDistribution) or distribution.low < 1 or distribution.step != 1:
        raise UserError(f"{where} is logarithmic, so it must contain whole numbers from 1, in steps of 1")
    return IntDistribution(distribution.low, distribution.high, log=True)


def _is_log(where: str, tags: set[str]) -> bool:
    unknown = sorted(tags - {"log", "int"})
    if unknown:
        raise UserError(f"{where}: the tag {unknown[0]} is unknown; use log or int")
    return "log" in tags


# --- drawing ----------------------------------------------------------------------------------------------------------


class _SuggestProxy:
    """The trial passed to `space(trial)`: Optuna's, but it tells equal choices (0 and false) apart and takes NumPy."""

    def __init__(self, trial: optuna.trial.BaseTrial, file: Path, fixed: Mapping[str, Any]) -> None:
        self._trial = trial
        self._file = file
        self._fixed = fixed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices, unchanged."""
        options = list(choices)
        try:
            given = make_labels(to_plain(option) for option in options)
        except TypeError as error:
            raise UserError(
                f"{self._file}: the choices of {name} must be numbers, text or lists of them, but {error}"
            ) from error
        if name in self._fixed:
            value = self._fixed[name]
            return next((option for option in options if is_equal(to_plain(option), value)), value)
        drawn = self._trial.suggest_categorical(name, tuple(dict.fromkeys(given)))
        return next(option for option, label in zip(options, given, strict=True) if is_same(label, drawn))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Return a number in the range."""
        low, high, step = to_plain(low), to_plain(high), to_plain(step)
        if name in self._fixed:
            return self._fixed[name]
        check_range(self._format_bounds(name, low, high), low, high, is_integer=False)
        if step is not None:
            check_steps(self._format_bounds(name, low, high), low, high, step)
        drawn = self._trial.suggest_float(name, low, high, step=step, log=log)
        # Not trial.distributions[name], which copies all distributions.
        return round_to_distribution(drawn, FloatDistribution(low, high, step=step, log=log))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Return an integer in the range."""
        low, high, step = to_plain(low), to_plain(high), to_plain(step)
        if name in self._fixed:
            return self._fixed[name]
        check_range(self._format_bounds(name, low, high), low, high, is_integer=True)
        return self._trial.suggest_int(name, low, high, step=step, log=log)

    def _format_bounds(self, name: str, low: float, high: float) -> str:
        return f"{self._file}: {name} from {low} to {high}"


def _sample_param(trial: optuna.trial.BaseTrial, key: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, FloatDistribution):
        drawn = trial.suggest_float(
            key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
        return round_to_distribution(drawn, distribution)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    assert isinstance(distribution, CategoricalDistribution)
    return trial.suggest_categorical(key, distribution.choices)


def _sample_space(space: Space, sampler: optuna.samplers.BaseSampler) -> Params:
    return space.sample(optuna.create_study(sampler=sampler).ask())


class IndependentSampler(optuna.samplers.BaseSampler):
    """Base class of samplers that draw each parameter by itself, in `sample_independent`."""

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}


class GivenValuesSampler(IndependentSampler):
    """Sampler that returns given values by name. Without a fitting value it returns the first choice or lower end."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def find_out_of_range(self, trial: optuna.trial.BaseTrial | optuna.trial.FrozenTrial) -> tuple[str, ...]:
        """Return the names of the draws whose given value is out of range."""
        given = [name for name in trial.params if name in self._values]
        return tuple(name for name in given if self._fit_value(name, trial.distributions[name]) is None)

    def find_missing(self, trial: optuna.trial.BaseTrial | optuna.trial.FrozenTrial) -> tuple[str, ...]:
        """Return the names of the draws that have no given value and more than one possible value."""
        return tuple(
            name for name, each in trial.distributions.items() if name not in self._values and not each.single()
        )

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        found = self._fit_value(param_name, param_distribution)
        if found is not None:
            return found[0]
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[0]
        assert isinstance(param_distribution, (FloatDistribution, IntDistribution))
        return param_distribution.low

    def _fit_value(self, name: str, distribution: BaseDistribution) -> tuple[Any] | None:
        """Return the value as the distribution stores it, in a tuple since it may be None; None if it does not fit."""
        if name not in self._values:
            return None
        try:
            return (fit_value(self._values[name], distribution),)
        except ValueError:
            return None


class _ExtremesSampler(IndependentSampler):
    """Sampler that returns the lower or upper end of every range, and one option of every choice."""

    def __init__(self, *, upper: bool, option: int) -> None:
        self.upper = upper
        self.option = option
        self.num_options = 0  # of the longest choice drawn so far

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        if isinstance(param_distribution, CategoricalDistribution):
            choices = param_distribution.choices
            self.num_options = max(self.num_options, len(choices))
            return choices[self.option % len(choices)]
        assert isinstance(param_distribution, (FloatDistribution, IntDistribution))
        return param_distribution.high if self.upper else param_distribution.low
