"""Reads what a sweep has searched, even if the search space is a Python file or the study does not exist."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from handpose.plain_values import is_same, to_json_text
from handpose.report.sweep_record import Parameter, TrialRecord
from handpose.search.distributions import fit_value, make_labels, parse_label
from handpose.search.space import Space, YamlSpace, fix_params, load_space, parse_space
from handpose.search.study import JOURNAL_FILE, close_storage, find_newest_study, open_storage_for_reading
from handpose.sweep.record.events import SpaceRecord
from handpose.utf8 import read_utf8

_Searched = tuple[list[Parameter], dict[int, dict[str, BaseDistribution]], dict[str, Any]]


def read_searched_space(
    folder: Path,
    config: Mapping[str, Any],
    trials: Sequence[TrialRecord],
    *,
    fixed_params: Mapping[str, Any],
    later: Sequence[SpaceRecord] = (),
) -> _Searched:
    """Read the searched parameters of a sweep.

    A search space in Python is never run, because the folder may belong to someone else. Instead the distributions are
    read from the study or, if it does not have them, inferred from the values of the trials.

    Args:
        folder: folder of the sweep.
        config: configuration of the sweep.
        trials: its trials.
        fixed_params: key -> value that the command line fixed.
        later: the search spaces to which the user has changed, in order.

    Returns:
        The parameters; trial -> key -> distribution; and key -> value of what is the same in all trials. After a change
        of the space, a parameter has the values of all spaces, the expression of the newest one, and in all trials the
        same distribution; what is the same in all trials is that of the newest space.
    """
    files = sorted((folder / "search_space").glob("*"))
    if later:
        return _merge_spaces(folder, config, trials, files, fixed_params, later)
    if files and files[0].suffix in (".yaml", ".yml"):
        space = fix_params(load_space(str(files[0])), fixed_params)
        assert isinstance(space, YamlSpace)
        declared: dict[int, dict[str, BaseDistribution]] = {trial.number: dict(space.parameters) for trial in trials}
        parameters = [
            _make_parameter(key, [each], text=space.expressions[key]) for key, each in space.parameters.items()
        ]
        return parameters, declared, dict(space.fixed)
    declared = _read_study_distributions(folder, config, trials)
    seen = _infer_distributions(trials)
    keys = dict.fromkeys(key for trial in trials for key in trial.params)
    distributions = {
        trial.number: {key: declared.get(trial.number, {}).get(key) or seen[key] for key in trial.params}
        for trial in trials
    }
    is_declared = {
        key: all(key in declared.get(trial.number, {}) for trial in trials if key in trial.params) for key in keys
    }
    parameters = []
    for key in keys:
        owners = [trial.number for trial in trials if key in trial.params]
        kinds = list({repr(distributions[number][key]): distributions[number][key] for number in owners}.values())
        parameters.append(
            _make_parameter(key, kinds, is_declared=is_declared[key], is_conditional=len(owners) < len(trials))
        )
    varied = [each for each in parameters if each.is_declared or each.num_values != 1]
    alike = keys.keys() - {each.key for each in varied}
    fixed = {key: next(trial.params[key] for trial in trials if key in trial.params) for key in keys if key in alike}
    return varied, distributions, fixed


def _merge_spaces(
    folder: Path,
    config: Mapping[str, Any],
    trials: Sequence[TrialRecord],
    files: Sequence[Path],
    fixed_params: Mapping[str, Any],
    later: Sequence[SpaceRecord],
) -> _Searched:
    """Describe the parameters of trials that were proposed from several search spaces."""
    written = [(parse_space(read_utf8(file), file)) for file in files[:1] if file.suffix != ".py"]
    spaces: list[YamlSpace | None] = [_fix_yaml(written[0], fixed_params) if written else None]
    for each in later:
        file = Path(each.name)
        is_code = file.suffix == ".py"
        spaces.append(None if is_code else _fix_yaml(parse_space(each.text, file), fixed_params))
    newest = spaces[-1]
    drawn = _read_study_distributions(folder, config, trials)
    declared: dict[str, list[BaseDistribution]] = {}
    for key, distribution in (
        *(item for space in reversed(spaces) if space is not None for item in space.parameters.items()),
        *(item for each in drawn.values() for item in each.items()),
    ):
        if distribution not in declared.setdefault(key, []):
            declared[key].append(distribution)
    in_file = newest.expressions if newest is not None else {}
    parameters: list[Parameter] = []
    merged: dict[str, BaseDistribution] = {}
    keys = dict.fromkeys([*in_file, *declared, *(key for trial in trials for key in trial.params)])
    for key in keys:
        values = [trial.params[key] for trial in trials if key in trial.params]
        is_varied = key in declared or len({to_json_text(value) for value in values}) > 1
        if not is_varied or not (values or key in in_file):
            continue
        merged[key] = _merge_distributions(declared.get(key, []), values)
        is_whole = key in declared and all(_contains(declared[key], value) for value in values)
        parameters.append(
            _make_parameter(
                key,
                [merged[key]],
                text=in_file.get(key, ""),
                is_declared=is_whole,
                is_conditional=len(values) < len(trials),
            )
        )
    distributions = {
        trial.number: {key: each for key, each in merged.items() if key in trial.params} for trial in trials
    }
    alike = {key: trial.params[key] for trial in trials for key in trial.params if key not in merged}
    fixed = alike if newest is None else dict(newest.fixed)
    return parameters, distributions, {key: value for key, value in fixed.items() if key not in merged}


def _fix_yaml(space: Space, fixed_params: Mapping[str, Any]) -> YamlSpace:
    assert isinstance(space, YamlSpace)
    fixed = fix_params(space, {key: value for key, value in fixed_params.items() if key in space.expressions})
    assert isinstance(fixed, YamlSpace)
    return fixed


def _contains(distributions: Sequence[BaseDistribution], value: Any) -> bool:
    """Return whether one of the distributions contains a value."""
    for each in distributions:
        with contextlib.suppress(ValueError):
            fit_value(value, each)
            return True
    return False


def _merge_distributions(distributions: Sequence[BaseDistribution], values: Sequence[Any]) -> BaseDistribution:
    """Return a distribution that contains these distributions and values: a range if all are numbers."""
    if len(distributions) == 1 and all(_contains(distributions, value) for value in values):
        return distributions[0]
    inferred = [_infer_distribution(values)] if values else []
    numeric = [each for each in (*distributions, *inferred) if isinstance(each, (FloatDistribution, IntDistribution))]
    if len(numeric) < len(distributions) + len(inferred):
        options = [parse_label(each) for kind in distributions for each in getattr(kind, "choices", ())]
        return CategoricalDistribution(tuple(dict.fromkeys(make_labels([*options, *values]))))
    low, high = min(each.low for each in numeric), max(each.high for each in numeric)
    ranges = [each for each in numeric if each in distributions] or numeric
    log = low > 0 and all(each.log for each in ranges)
    if all(isinstance(each, IntDistribution) for each in numeric):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _read_study_distributions(
    folder: Path, config: Mapping[str, Any], trials: Sequence[TrialRecord]
) -> dict[int, dict[str, BaseDistribution]]:
    """Return trial -> key -> distribution from the study.

    Only keys that were drawn under their own name are included.
    """
    if not (folder / "study" / JOURNAL_FILE).is_file():
        return {}
    try:
        storage = open_storage_for_reading(None, folder / "study")
        study = find_newest_study(storage, config["sweep"]["name"])
        drawn = (
            {} if study is None else {each.number: each for each in storage.get_all_trials(study[0], deepcopy=False)}
        )
        close_storage(storage)
    except Exception:  # another version of Optuna wrote it, or a sweep is writing it now
        return {}
    return {
        trial.number: {
            key: each
            for key, each in drawn[trial.number].distributions.items()
            if key in trial.params and is_same(parse_label(drawn[trial.number].params[key]), trial.params[key])
        }
        for trial in trials
        if trial.number in drawn
    }


def _infer_distributions(trials: Iterable[TrialRecord]) -> dict[str, BaseDistribution]:
    """Return key -> a distribution that contains the values of all trials."""
    values: dict[str, list[Any]] = {}
    for trial in trials:
        for key, value in trial.params.items():
            values.setdefault(key, []).append(value)
    return {key: _infer_distribution(each) for key, each in values.items()}


def _infer_distribution(values: Sequence[Any]) -> BaseDistribution:
    def are(kind: type) -> bool:
        return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)

    if are(int):
        return IntDistribution(min(values), max(values))
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return FloatDistribution(float(min(values)), float(max(values)))
    return CategoricalDistribution(tuple(dict.fromkeys(make_labels(values))))


def _make_parameter(
    key: str,
    distributions: Sequence[BaseDistribution],
    *,
    text: str = "",
    is_declared: bool = True,
    is_conditional: bool = False,
) -> Parameter:
    """Describe a parameter; if its distributions differ between trials, by the range that contains them all."""
    extra: dict[str, Any] = {"expression": text, "is_declared": is_declared, "is_conditional": is_conditional}
    first = distributions[0]
    if isinstance(first, CategoricalDistribution):
        labels = dict.fromkeys(
            (type(each), each)
            for kind in distributions
            if isinstance(kind, CategoricalDistribution)
            for each in kind.choices
        )
        return Parameter(key, "choice", choices=[parse_label(each) for _, each in labels], **extra)
    numeric = [kind for kind in distributions if isinstance(kind, (FloatDistribution, IntDistribution))]
    low, high = min(kind.low for kind in numeric), max(kind.high for kind in numeric)
    log, step = numeric[0].log, numeric[0].step
    kind: Literal["float", "int"] = "int" if isinstance(first, IntDistribution) else "float"
    return Parameter(key, kind, low, high, log, None if log else step, **extra)
