"""The house's rule of one-way imports, read from the source."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = sorted(path for path in (REPOSITORY / "handpose").rglob("*.py") if path.name != "__init__.py")
SCRIPTS = [REPOSITORY / "tune.py", REPOSITORY / "train.py"]

LAYERS = [
    {"errors", "resources", "utf8", "skeleton", "malloc", "garbage", "openmp", "pareto", "plain_values"},
    {"files", "locks", "formats", "urls", "config_files", "budget", "dotenv_file"},
    {"yaml_files"},
    {"geometry", "drawing"},
    {"heatmaps"},
    {"schema"},
    {"losses", "data", "models", "metrics"},
    {"config"},
    {"program"},
    {"training", "evaluation"},
    {"search", "schedulers", "sweep", "report", "predict", "export", "dashboard"},
]
SIBLINGS = ({"data", "models", "metrics"},)
ROOMS = (
    "search",
    "schedulers",
    "record",
    "storage",
    "controller",
    "trainable",
    "analysis",
    "execution",
    "budget",
    "driver",
    "preflight",
    "selection",
    "audit",
    "status",
    "why",
    "control",
    "plan",
    "budgeted_plan",
    "resumed_budget",
)
"""The sweep's half, lowest first: a room imports from itself and from those before it."""

RAY_ROOMS = {"trainable", "execution"}
DISTRIBUTIONS = {
    "hydra": "hydra-core",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "dotenv": "python-dotenv",
    "pytorch_lightning": "pytorch-lightning",
    "google": "protobuf",
    "lightning_fabric": "pytorch-lightning",
    "jsonschema": "ray",
    "pynvml": "nvidia-ml-py",
}


@functools.cache
def list_imports(path: Path) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} if node.module != "handpose" else {f"handpose.{alias.name}" for alias in node.names}
    return frozenset(names)


def find_place(dotted: str) -> str:
    return dotted.split(".")[1]


def find_layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def to_module_name(path: Path) -> str:
    return path.relative_to(REPOSITORY / "handpose").with_suffix("").parts[0]


def get_name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=get_name)
def test_imports_point_one_way(path):
    for imported in list_imports(path):
        if imported.startswith("handpose."):
            assert find_layer(find_place(imported)) <= find_layer(to_module_name(path)), (
                f"{get_name(path)} imports {imported}"
            )


@pytest.mark.parametrize("path", MODULES, ids=get_name)
def test_siblings_do_not_import_each_other(path):
    for siblings in SIBLINGS:
        if to_module_name(path) in siblings:
            others = {find_place(item) for item in list_imports(path) if item.startswith("handpose.")} & siblings
            assert others <= {to_module_name(path)}


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("ray", {"sweep"}),
        ("optuna", {"sweep", "search", "schedulers"}),
        ("hydra", {"config", "program", "training", "sweep", "search"}),
        ("omegaconf", {"config", "program", "training", "sweep", "search"}),
    ],
)
def test_a_library_is_imported_only_where_it_belongs(package, homes):
    users = {to_module_name(path) for path in MODULES if package in {item.split(".")[0] for item in list_imports(path)}}
    assert users <= homes


def find_room(dotted: str) -> str | None:
    """The room of a module of the sweep's half; None for any other module."""
    parts = dotted.split(".")[1:]
    if parts[0] == "sweep":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ROOMS else None


def to_dotted_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


SWEEP_MODULES = [path for path in MODULES if find_room(to_dotted_name(path)) is not None]


@pytest.mark.parametrize("path", SWEEP_MODULES, ids=get_name)
def test_a_room_imports_only_from_itself_and_from_lower_rooms(path):
    here = find_room(to_dotted_name(path))
    for imported in list_imports(path):
        there = find_room(imported) if imported.startswith("handpose.") else None
        assert there is None or ROOMS.index(there) <= ROOMS.index(here), f"{get_name(path)} imports {imported}"


@pytest.mark.parametrize("path", SWEEP_MODULES, ids=get_name)
def test_ray_is_imported_only_where_it_belongs(path):
    if "ray" in {item.split(".")[0] for item in list_imports(path)}:
        assert find_room(to_dotted_name(path)) in RAY_ROOMS


@pytest.mark.parametrize("folder", [name for name in ROOMS if (REPOSITORY / "handpose/sweep" / name).is_dir()])
def test_a_room_says_what_it_owns(folder):
    text = ast.get_docstring(ast.parse((REPOSITORY / "handpose/sweep" / folder / "__init__.py").read_text()))
    assert text
    assert f"{folder}/" in ast.get_docstring(ast.parse((REPOSITORY / "handpose/sweep/__init__.py").read_text()))


def test_private_parts_of_ray_are_used_in_one_file_only():
    private = re.compile(r"ray\._private|ray\.core\.|_internal|class_cache")
    users = {
        get_name(path)
        for path in MODULES
        if any(private.search(item) for item in list_imports(path) if item[:3] == "ray")
    }
    assert users == {"handpose/sweep/execution/ray_internals.py"}


def test_every_use_of_private_parts_of_ray_states_its_fallback():
    tree = ast.parse((REPOSITORY / "handpose/sweep/execution/ray_internals.py").read_text())
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]:
        assert re.search("[Ff]allback", ast.get_docstring(function) or ""), function.name


def test_the_installed_ray_is_one_that_was_tried_and_requirements_allow_no_other():
    from importlib.metadata import version

    from handpose.sweep.execution.ray_internals import TESTED_VERSIONS

    assert version("ray") in TESTED_VERSIONS
    line = next(each for each in (REPOSITORY / "requirements.txt").read_text().splitlines() if each.startswith("ray["))
    low, high = re.fullmatch(r">=(\d+\.\d+),<(\d+\.\d+)", line.partition("]")[2].partition("#")[0].strip()).groups()
    assert {low} == {tried.rpartition(".")[0] for tried in TESTED_VERSIONS}
    assert [int(part) for part in high.split(".")] == [int(low.split(".")[0]), int(low.split(".")[1]) + 1]


def test_report_sees_no_model_no_trainer_and_no_sweep_but_where_it_is_a_program():
    for path in MODULES:
        if to_module_name(path) == "report" and path.name != "__main__.py":
            places = {find_place(item) for item in list_imports(path) if item.startswith("handpose.")}
            assert not places & {"models", "training", "evaluation", "data", "sweep"}, get_name(path)
            assert "pytorch_lightning" not in {item.split(".")[0] for item in list_imports(path)}


def test_everything_imported_is_in_requirements():
    text = (REPOSITORY / "requirements.txt").read_text()
    required = {re.split(r"[\[<>=~ ]", line)[0].lower() for line in text.splitlines() if line and line[0] != "#"}
    used = {
        item.split(".")[0]
        for path in [*MODULES, *SCRIPTS, *REPOSITORY.glob("tests/**/*.py")]
        for item in list_imports(path)
    }
    third_party = used - set(sys.stdlib_module_names) - {"handpose", "benchmarks", "cluster", "docs", "tests"}
    third_party -= {"train", "tune", "wandb"}
    assert {DISTRIBUTIONS.get(item, item) for item in third_party} <= required
