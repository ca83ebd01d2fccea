from pathlib import Path

import pytest

from handpose.config import compose
from handpose.training.fit import RunFolders
from tests.builders import write_freihand

SMALL = [
    "data=freihand",
    "data.batch_size=8",
    "data.image_size=64",
    "data.source.val_fraction=0.25",
    "data.source.num_blocks=2",
    "model.decoder.depth=2",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "num_threads=1",
]


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    return write_freihand(tmp_path_factory.mktemp("freihand"), num_poses=24, variants=1, num_test=6, size=64)


@pytest.fixture
def configure(root, tmp_path):
    """compose("train") on a small data set, with every output under the test's own folder."""

    def configured(*overrides):
        return compose("train", [*SMALL, f"data.root={root}", f"paths.output={tmp_path / 'outputs'}", *overrides])

    return configured


@pytest.fixture
def folders(tmp_path) -> RunFolders:
    made = RunFolders(tmp_path / "logs", tmp_path / "checkpoints", tmp_path / "predictions")
    for folder in (made.logs, made.checkpoints, made.predictions):
        folder.mkdir()
    return made
