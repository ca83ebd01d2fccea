"""The house's rule of one-way imports, read from the source."""

import ast
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = sorted(path for path in (REPOSITORY / "handpose").rglob("*.py") if path.name != "__init__.py")
SCRIPTS = [REPOSITORY / "tune.py", REPOSITORY / "train.py"]

LAYERS = [
    {"errors", "skeleton", "allocation", "resources", "whole_file", "locks", "pareto", "values", "yaml_files", "utf8"},
    {"geometry", "drawing"},
    {"heatmaps"},
    {"losses", "data", "models", "metrics"},
    {"schema"},
    {"config"},
    {"training", "evaluation"},
    {"sweep", "report", "predict", "export"},
]
SIBLINGS = ({"data", "models", "metrics"},)
DISTRIBUTIONS = {
    "hydra": "hydra-core",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "dotenv": "python-dotenv",
    "pytorch_lightning": "pytorch-lightning",
    "google": "protobuf",
    "lightning_fabric": "pytorch-lightning",
    "jsonschema": "ray",
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} if node.module != "handpose" else {f"handpose.{alias.name}" for alias in node.names}
    return names


def place(dotted: str) -> str:
    return dotted.split(".")[1]


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def ours(path: Path) -> str:
    return path.relative_to(REPOSITORY / "handpose").with_suffix("").parts[0]


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_point_one_way(path):
    for imported in imports(path):
        if imported.startswith("handpose."):
            assert layer(place(imported)) <= layer(ours(path)), f"{name(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_siblings_do_not_import_each_other(path):
    for siblings in SIBLINGS:
        if ours(path) in siblings:
            others = {place(item) for item in imports(path) if item.startswith("handpose.")} & siblings
            assert others <= {ours(path)}


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("ray", {"sweep"}),
        ("optuna", {"sweep"}),
        ("hydra", {"config", "training", "sweep"}),
        ("omegaconf", {"config", "training", "sweep"}),
    ],
)
def test_a_library_is_imported_only_where_it_belongs(package, homes):
    users = {ours(path) for path in MODULES if package in {item.split(".")[0] for item in imports(path)}}
    assert users <= homes


def test_report_sees_no_model_no_trainer_and_no_sweep_but_where_it_is_a_program():
    for path in MODULES:
        if ours(path) == "report" and path.name != "__main__.py":
            places = {place(item) for item in imports(path) if item.startswith("handpose.")}
            assert not places & {"models", "training", "evaluation", "data", "sweep"}, name(path)
            assert "pytorch_lightning" not in {item.split(".")[0] for item in imports(path)}


def test_everything_imported_is_in_requirements():
    text = (REPOSITORY / "requirements.txt").read_text()
    required = {re.split(r"[\[<>=~ ]", line)[0].lower() for line in text.splitlines() if line and line[0] != "#"}
    used = {
        item.split(".")[0] for path in [*MODULES, *SCRIPTS, *REPOSITORY.glob("tests/**/*.py")] for item in imports(path)
    }
    third_party = used - set(sys.stdlib_module_names) - {"handpose", "benchmarks", "cluster", "tests"}
    third_party -= {"train", "tune", "wandb"}
    assert {DISTRIBUTIONS.get(item, item) for item in third_party} <= required


def test_the_map_of_the_sweep_package_names_every_module():
    described = ast.get_docstring(ast.parse((REPOSITORY / "handpose/sweep/__init__.py").read_text()))
    named = set(re.findall(r"`(\w+)`", described))
    assert named == {path.stem for path in MODULES if path.parent.name == "sweep"}
