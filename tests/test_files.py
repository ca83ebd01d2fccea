"""Files of JSON, as any parser reads them."""

import json
import math

import pytest

from handpose.files import to_json, write_json

NOT_FINITE = {"a": math.nan, "b": [1.5, math.inf, {"c": -math.inf}], "d": (math.nan, 2), "e": None, "f": "NaN"}


def test_numbers_that_are_not_finite_become_null_at_any_depth():
    strict = json.loads(to_json(NOT_FINITE), parse_constant=pytest.fail)
    assert strict == {"a": None, "b": [1.5, None, {"c": None}], "d": [None, 2], "e": None, "f": "NaN"}


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "new/a.json", {"ä": 1}, indent=1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "new/a.json", {"a": object()})
    assert json.loads((tmp_path / "new/a.json").read_text(encoding="utf-8")) == {"ä": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
