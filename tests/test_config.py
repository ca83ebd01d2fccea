import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from handpose import config_files
from handpose.config import (
    SWEEP_GROUPS,
    compose,
    dotted_keys,
    list_location_overrides,
    quote_override,
    to_plain_values,
)
from handpose.config_files import CONFIGS
from handpose.errors import UserError
from handpose.search.space import flatten_config

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
GROUPS = sorted(
    f"{path.parent.relative_to(CONFIGS).as_posix()}={path.stem}"
    for path in CONFIGS.glob("*/**/*.yaml")
    if not {"experiment", "sweep", "scheduler", "searcher", "ray", "metrics"} & set(path.relative_to(CONFIGS).parts)
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(name):
    assert compose("train", [f"experiment={name}"]).trainer.max_epochs == 145


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_predicts_with_the_mean_over_rotations_as_the_original_did(name):
    config = compose("train", [f"experiment={name}"])
    views = instantiate(config.test_time)
    views.check_axes(instantiate(config.heatmap))
    assert np.degrees(views.angles) == pytest.approx(np.arange(8) * 45)  # it was trained on the full circle
    assert (views.mirror, views.scales, views.crop) == (False, [1.0], None)
    assert compose("train", [f"experiment={name}", "test_time=none"]).test_time.num_rotations == 1
    assert compose("train", [f"experiment={name}", "test_time.mirror=true"]).test_time.mirror


@pytest.mark.parametrize("choice", GROUPS)
def test_every_choice_of_every_group_composes(choice):
    compose("train", [choice])


def test_tune_has_all_keys_of_train_with_the_same_defaults():
    train, tune = to_plain_values(compose("train", [])), to_plain_values(compose("tune", []))
    train["paths"].pop("time"), tune["paths"].pop("time")
    for name in ("logs", "checkpoints", "predictions"):
        train["paths"].pop(name), tune["paths"].pop(name)
    assert {key: tune[key] for key in train} == train


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimzer.lr=1", r"no configuration key optimzer\.lr; did you mean optimizer\.lr"),
        ("lr=1", r"did you mean optimizer\.lr"),
        ("trainer.precison=16", r"did you mean trainer\.precision"),
        ("+trainer.precison=16-true", r"did you mean trainer\.precision"),
        ("+optimzer.lr=1", r"did you mean optimizer\.lr"),
        ("+data.imagesize=64", r"did you mean data\.image_size"),
        ("optimizer.betas=[0.9,0.99]", r"write \+optimizer\.betas=\.\.\."),
        ("data=freihnad", "data=freihnad: no such choice; did you mean freihand"),
        ("model/decoder=efpose", "did you mean effpose"),
        ("experiment=exp_submision", "did you mean exp_submission"),
        ("optimizer.lr=fast", r"optimizer\.lr=fast: input should be a valid number"),
        ("model.decoder.depth=2.5", r"model\.decoder\.depth=2\.5: input should be a valid integer"),
        ("model.decoder.depth=-1", r"model\.decoder\.depth must be at least 0, but it is -1"),
        ("model.decoder.skips=sum", r"model\.decoder\.skips=sum: input should be 'none' or 'add'"),
        ("trainer.max_epochs=0", r"trainer\.max_epochs must be at least 1"),
        ("seed=one", "seed=one: input should be a valid integer"),
        ("test_time=mirror", "test_time=mirror: no such choice; there is full, none, rotations, rotations_mirror"),
        ("test_time=null", "test_time=null: no such choice"),
        ("test_time.crop=2", r"test_time\.crop must be at most 1, but it is 2"),
        ("test_time.scales=[1.0,big]", r"test_time\.scales=.*input should be a valid number"),
        ("optimizer.lr=interval(1,2)", "is a search range; it belongs in a file under search_spaces/"),
        ("optimizer.lr", r"cannot read 'optimizer\.lr'"),
        ("best=nowhere.yaml", r"best=nowhere\.yaml: there is no such file"),
    ],
)
def test_a_mistake_is_one_sentence(override, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        compose("train", [override])
    assert "\n" not in str(error.value)


def test_an_argument_without_a_value_can_be_added():
    assert compose("train", ["+optimizer.betas=[0.9,0.99]"]).optimizer.betas == [0.9, 0.99]


@pytest.mark.parametrize(
    "value",
    [
        *("two words", 1e-4, 3, True, None, "a=b", "true", "1e3", "null", [1, 2], ["a b", None], "it's", "ünï", ""),
        *({"ho3d": {"weight": 2, "root": "a, b"}, "x": None}, {"a": [1, "it's"]}, {}),
        *("C:\\x", "a\\ [b]", "it\\'s", "end [x]\\", "\\\\two, three\\\\"),
    ],
)
def test_a_quoted_override_is_read_back_as_the_same_value(value):
    assert OverridesParser.create().parse_override(quote_override("anything", value)).value() == value


def test_relative_paths_start_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MP_DATA", raising=False)
    monkeypatch.delenv("DIR_SCRATCH", raising=False)
    config = compose("train", [])
    assert config.paths.data == str(tmp_path / "data")
    assert Path(config.paths.logs).is_relative_to(tmp_path / "outputs/logs/runs")


def test_paths_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MP_DATA", str(tmp_path / "hands"))
    monkeypatch.setenv("DIR_SCRATCH", str(tmp_path / "scratch"))
    config = compose("train", ["data=freihand_course"])
    assert config.data.root == str(tmp_path / "hands")
    assert Path(config.paths.checkpoints).is_relative_to(tmp_path / "scratch/logs/ckpts")


def test_another_process_elsewhere_composes_the_same_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MP_DATA", "hands")
    overrides = ["data=freihand", "data.root=here"]
    config = compose("train", overrides)
    locations = list_location_overrides(config)
    monkeypatch.delenv("MP_DATA")
    monkeypatch.chdir("/")
    there = compose("train", [*locations, *overrides])
    assert there.data.root == config.data.root == str(tmp_path / "here")
    assert there.paths.data == config.paths.data == str(tmp_path / "hands")
    assert os.getcwd() == "/"


def test_the_best_of_a_sweep_comes_before_the_command_line(tmp_path):
    path = tmp_path / "best.yaml"
    path.write_text(yaml.safe_dump({"overrides": ["model.decoder.depth=2", "optimizer.lr=0.5"]}))
    config = compose("train", [f"best={path}", "optimizer.lr=0.25"])
    assert (config.model.decoder.depth, config.optimizer.lr) == (2, 0.25)


@pytest.mark.parametrize("name", ["a b", "it's", "x [1], y"])
def test_the_best_of_a_sweep_may_lie_in_any_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    path = tmp_path / name / "best.yaml"
    path.write_text(yaml.safe_dump({"overrides": ["optimizer.lr=0.5"]}))
    config = compose("train", [quote_override("best", str(path))])
    assert (config.optimizer.lr, config.best) == (0.5, str(path))


def test_a_value_that_needs_quotes_is_shown_with_the_quotes_that_it_needs():
    with pytest.raises(UserError, match=r"""quotes for Hydra and for the shell: "data.root='/a \[b\]'"$"""):
        compose("train", ["data.root=/a [b]"])


def test_a_file_that_is_no_best_yaml_is_refused(tmp_path):
    (tmp_path / "best.yaml").write_text("winner: 3")
    with pytest.raises(UserError, match=r"is not the best\.yaml of a sweep"):
        compose("train", [f"best={tmp_path / 'best.yaml'}"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sweep.set_aside_after=5", "sweep.quarantine_after_failures"),
        ("sweep.explosion_factor=5", "sweep.divergence_factor"),
        ("searcher.first=[{optimizer.lr:0.1}]", "searcher.points_to_evaluate"),
    ],
)
def test_a_key_is_accepted_under_its_former_name(old, new):
    before, now = (OmegaConf.select(compose("tune", given), new) for given in ([], [old]))
    assert now != before


def test_keys_of_leaves_and_of_what_holds_them_are_dotted():
    assert list(dotted_keys({"a": {"b": 1, "c": {"d": 2}}, "e": {}})) == ["a", "a.b", "a.c", "a.c.d", "e"]


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """A folder of a user with a loss and an augmentation that extends one of the project's."""
    folder = tmp_path / "Meine Module"
    for group in ("loss", "augment"):
        (folder / "configs" / group).mkdir(parents=True)
    (folder / "users_loss.py").write_text("class Loss:\n    def __init__(self, *, factor: float) -> None: ...\n")
    (folder / "configs" / "loss" / "users.yaml").write_text("_target_: users_loss.Loss\nfactor: 2.0\n")
    (folder / "configs" / "augment" / "wild.yaml").write_text("defaults: [default]\nscale: 0.5\n")
    monkeypatch.setattr(config_files, "_extensions", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def test_options_and_classes_of_a_users_folder_are_found(extensions, monkeypatch):
    monkeypatch.chdir(extensions.parent)
    config = compose("train", [quote_override("paths.extensions", extensions.name), "loss=users", "augment=wild"])
    assert (config.loss.factor, config.augment.scale, config.augment.blur) == (2.0, 0.5, 0.0)
    assert type(instantiate(config.loss)).__name__ == "Loss"
    assert config.paths.extensions == str(extensions)
    with pytest.raises(UserError, match=r"loss\.factor=much: input should be a valid number"):
        compose("train", ["loss=users", "loss.factor=much"])


def test_another_process_elsewhere_finds_the_users_folder(extensions, monkeypatch):
    monkeypatch.chdir(extensions.parent)
    overrides = [quote_override("paths.extensions", extensions.name), "loss=users"]
    locations = list_location_overrides(compose("train", overrides))
    monkeypatch.setattr(config_files, "_extensions", None)
    monkeypatch.chdir("/")
    assert compose("train", [*locations, *overrides]).paths.extensions == str(extensions)


def test_a_users_folder_that_is_not_there_is_one_sentence(extensions):
    with pytest.raises(UserError, match=r"paths\.extensions=nowhere: the folder .* does not exist; .*extending"):
        compose("train", ["paths.extensions=nowhere"])


def test_an_option_of_a_users_folder_that_is_not_given_is_no_choice(extensions):
    with pytest.raises(UserError, match="loss=users: no such choice"):
        compose("train", ["loss=users"])
    with pytest.raises(UserError, match=r"loss=users_loss\.Loss: no such choice; if it is .* paths\.extensions=FOLDER"):
        compose("train", ["loss=users_loss.Loss"])


def test_every_key_that_only_a_sweep_has_belongs_to_one_of_its_groups():
    """Otherwise trials and the retraining would get it, and refuse it."""
    own = flatten_config(to_plain_values(compose("tune", []))).keys()
    own -= flatten_config(to_plain_values(compose("train", []))).keys()
    assert {key.partition(".")[0] for key in own} <= set(SWEEP_GROUPS)
