import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handpose import config_files
from handpose.config import compose, to_plain_values
from handpose.config_files import use_extensions
from tests.builders import make_hands, write_freihand
from tests.composition import cache_composition

# Fixtures import PyTorch, Optuna and Ray themselves, because these imports take seconds. The controller process of
# pytest-xdist loads this file, too, and needs none of them; the workers start only after it has loaded the file.

SIZE = 64


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extensions", type=Path, help="of tests/contracts: test the options in FOLDER/configs instead")


def pytest_configure(config: pytest.Config) -> None:
    if (folder := config.getoption("--extensions")) is not None:
        use_extensions(folder.resolve())
    patch = pytest.MonkeyPatch()
    cache_composition(patch)  # before the collection, because it composes the options of the contract tests
    patch.setattr(os, "fsync", lambda descriptor: None)  # only a power failure would show the difference
    config.add_cleanup(patch.undo)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests, so that at the end no process is alone with one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)  # stable: the order within a file stays


@pytest.fixture(autouse=True)
def _forget_extensions() -> Iterator[None]:
    """Forget a user's folder that a test has used. Its modules stay on the path, but no configuration names them."""
    before = config_files._extensions
    yield
    config_files._extensions = before


@pytest.fixture(scope="session")
def latin_1_if_possible(tmp_path_factory) -> dict[str, str] | None:
    """The variables of a German locale of the last century, if this machine can make one."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        return None
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")]
    made = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if made.returncode > 1:  # 1: it was made, with warnings
        return None
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}


@pytest.fixture(scope="session")
def latin_1(latin_1_if_possible) -> dict[str, str]:
    if latin_1_if_possible is None:
        pytest.skip("there is no localedef that makes the locale de_DE.ISO-8859-1")
    return latin_1_if_possible


@pytest.fixture(scope="session")
def freihand(tmp_path_factory) -> Path:
    return write_freihand(tmp_path_factory.mktemp("freihand"), num_poses=24, variants=1, num_test=6, size=SIZE)


@pytest.fixture(scope="session")
def write_checkpoint(freihand, tmp_path_factory):
    """A checkpoint of a small network that has learned nothing but is sure of it, as a function of more overrides."""
    import torch

    from handpose.training.build import build_training

    def written(*overrides: str) -> Path:
        config = compose(
            "train",
            [
                *["data=freihand", f"data.root={freihand}", f"data.image_size={SIZE}", "data.batch_size=4"],
                *["data.source.val_fraction=0.25", "data.source.num_blocks=2", "num_threads=1"],
                *["model.encoder.name=test_efficientnet", "model.decoder.depth=2", *overrides],
            ],
        )
        module, _ = build_training(config, pretrained=False, quiet=True)
        module.axes.fit(torch.from_numpy(make_hands(24)).float())
        with torch.no_grad():  # else all joints lie in the middle of their axes, and the hand as far as can be
            for weights in (parameter for parameter in module.net.decoder.parameters() if parameter.ndim > 1):
                weights.mul_(10.0)
        path = tmp_path_factory.mktemp("run") / "last.ckpt"
        torch.save({"config": to_plain_values(config), "state_dict": module.state_dict(), "epoch": 0}, path)
        return path

    return written


@pytest.fixture(scope="session")
def checkpoint(write_checkpoint) -> Path:
    return write_checkpoint()


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[..., Path]]:
    """A small disk at tmp_path/disk, as a function of its bytes and of how many are left; root alone can mount it."""
    folder = tmp_path / "disk"

    def mounted(num_bytes: int, *, free: int | None = None, options: str = "") -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}{options}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        if free is not None:
            (folder / "other").write_bytes(bytes(num_bytes - free))
        return folder

    yield mounted
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


@pytest.fixture(scope="session")
def ray_started():
    """Two slots of one core."""
    from handpose.sweep.execution.runtime import start_ray
    from handpose.sweep.record.settings import RaySettings

    with warnings.catch_warnings(), start_ray(RaySettings(address=None, num_cpus=2)):
        yield


@pytest.fixture
def write_space(tmp_path):
    """Makes a search space of the given text."""
    from handpose.search.space import load_space

    def write(text, suffix=".yaml"):
        file = tmp_path / f"space{suffix}"
        file.write_text(text)
        return load_space(str(file))

    return write
