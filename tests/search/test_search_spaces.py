"""The contract of every file in search_spaces/; that all of it composes is tested with the preflight's checks."""

import pytest

from handpose.config import compose, find_choice, to_plain_values
from handpose.search.space import SPACES_FOLDER, find_default_point, flatten_config, load_space

NAMES = sorted(file.stem for file in SPACES_FOLDER.iterdir() if file.suffix in (".yaml", ".py"))


def test_there_are_the_spaces_that_the_readme_names():
    assert {"default", "recipe", "architecture", "full", "accuracy_latency"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_configuration_is_in_the_space(name):
    values = flatten_config(to_plain_values(compose("tune", [])))
    for group in ("model/decoder", "lr_schedule"):
        values[group] = find_choice(group, values[f"{group.replace('/', '.')}._target_"])
    assert find_default_point(load_space(name), values) is not None
