import pytest

from handpose.config import compose
from handpose.training.fit import RunFolders
from tests import builders

SMALL = [
    *builders.SMALL,
    "model.decoder.depth=2",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "num_threads=1",
]


@pytest.fixture
def configure(freihand, tmp_path):
    """compose("train") on a small data set, with every output under the test's own folder."""

    def configured(*overrides):
        return compose("train", [*SMALL, f"data.root={freihand}", f"paths.output={tmp_path / 'outputs'}", *overrides])

    return configured


@pytest.fixture
def folders(tmp_path) -> RunFolders:
    made = RunFolders(tmp_path / "logs", tmp_path / "checkpoints", tmp_path / "predictions")
    for folder in (made.logs, made.checkpoints, made.predictions):
        folder.mkdir()
    return made
