"""What the driver gives Ray's workers."""

import pytest

from handpose import OPENMP_WAIT_VARIABLES
from handpose.sweep.execution.runtime import make_worker_environment


@pytest.mark.parametrize("variables", [{"OMP_WAIT_POLICY": "PASSIVE"}, {"GOMP_SPINCOUNT": "9", "KMP_BLOCKTIME": "1"}])
def test_openmp_waits_in_the_workers_of_all_nodes_as_in_the_driver(monkeypatch, variables):
    for name in OPENMP_WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = make_worker_environment()
    assert {name: given[name] for name in OPENMP_WAIT_VARIABLES if name in given} == variables
    assert given["PYTHONUTF8"] == "1"
