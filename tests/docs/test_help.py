"""The help of every program has a command that runs it, and says what each option is for."""

import argparse
import importlib
import sys

import pytest

from handpose.config_files import REPOSITORY

_MARKS = ("def main(", '__name__ == "__main__"')
_PROGRAMS = sorted(
    file.relative_to(REPOSITORY).as_posix()
    for folder in ("benchmarks", "cluster", "handpose")
    for file in (REPOSITORY / folder).rglob("*.py")
    if all(mark in file.read_text(encoding="utf-8") for mark in _MARKS)
)
_LAUNCHERS = {"cluster/kuberay.py", "cluster/lsf.py", "cluster/ray_up.py", "cluster/slurm.py"}
_WITHOUT_OPTIONS = ["benchmarks/cheap_sweep.py", "cluster/sweep.py"]
"""Programs that take the arguments of tune.py. Their help is the text at the top of the file."""


class _Built(BaseException):
    """Ends a program when its parser is complete."""


@pytest.fixture
def build_parser(monkeypatch):
    """Return the parser of a program."""

    def end(parser, *args, **kwargs):
        raise _Built(parser)

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, end)

    def build(file):
        monkeypatch.setattr(sys, "argv", [file, "--", "sweep.name=hands"])
        main = importlib.import_module(_name_module(file)).main
        with pytest.raises(_Built) as built:
            main(*[sys.argv[1:]] if file in _LAUNCHERS else [])
        return built.value.args[0]

    return build


def _list_options(parser):
    """The options of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _list_options(command)
        else:
            yield action


def _name_module(file):
    return file.removesuffix(".py").replace("/", ".")


@pytest.mark.parametrize("file", [file for file in _PROGRAMS if file not in _WITHOUT_OPTIONS])
def test_the_help_has_an_example_and_explains_every_option(file, build_parser):
    parser = build_parser(file)
    module = _name_module(file).removesuffix(".__main__").removesuffix(".audit")
    text = parser.format_help()
    assert f"  python {file}" in text or f"  python -m {module}" in text
    assert [action.dest for action in _list_options(parser) if not action.help] == []


@pytest.mark.parametrize("file", _WITHOUT_OPTIONS)
def test_a_program_without_options_prints_what_it_does(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    importlib.import_module(_name_module(file)).main()
    assert f"    python {file} " in (out := capsys.readouterr().out) or f"python -m {_name_module(file)} " in out
