"""What is checked of a report before the sweep that it will be about."""

import pytest

from handpose.errors import UserError
from handpose.search.space import load_space
from handpose.sweep.analysis.report import check_scientific_key


@pytest.mark.parametrize(
    ("space", "key"), [("default", "optimizer.lr"), ("decoder_family", "model.decoder.skips"), ("default", None)]
)
def test_a_searched_key_can_be_scientific(space, key):
    check_scientific_key(key, load_space(space))


@pytest.mark.parametrize("space", ["default", "decoder_family"])
def test_another_key_is_refused_with_those_that_are_searched(space):
    with pytest.raises(UserError, match=r"report.scientific=seed is not searched .*heatmap.sigma, .*optimizer.lr"):
        check_scientific_key("seed", load_space(space))
