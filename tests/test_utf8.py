"""Programs behave alike in every locale: they read and write UTF-8, names of files included."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from handpose import config_files
from handpose.config import compose
from handpose.dotenv_file import load_dotenv_file
from handpose.errors import UserError
from handpose.search.space import load_space
from handpose.utf8 import read_utf8
from handpose.yaml_files import load_yaml

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = [path for name in ("handpose", "cluster", "benchmarks") for path in (REPOSITORY / name).rglob("*.py")]
TEXT_MODES = re.compile("[rwxat+]*")


# --- locales ----------------------------------------------------------------------------------------------------------


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(params=["latin_1", "ascii"])
def locale(request):
    """Variables of an environment whose encoding is not UTF-8, and that encoding."""
    return request.getfixturevalue("latin_1") if request.param == "latin_1" else ASCII


def run_program(*command, cwd, locale, timeout=300):
    """Run a Python program in a locale; its output, as the bytes that it wrote, in UTF-8."""
    names = ("LC_", "LANG", "PYTHONUTF8", "PYTHONIOENCODING", "MP_DATA", "DIR_SCRATCH")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | locale
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, timeout=timeout)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


def test_a_locale_has_its_encoding_before_the_program_asks_for_utf_8(locale, tmp_path):
    code = "import sys; print(sys.getfilesystemencoding())"
    assert run_program("-c", code, cwd=tmp_path, locale=locale)[1].strip() in ("iso8859-1", "ascii")


def test_a_program_prints_and_takes_what_its_locale_lacks(locale, tmp_path):
    code = "import sys; from handpose.utf8 import use_utf8; use_utf8(); print(open(sys.argv[1]).name, '\\u2501')"
    (tmp_path / "Größe").touch()
    status, out, err = run_program("-c", code, "Größe", cwd=tmp_path, locale=locale)
    assert (status, out, err) == (0, "Größe ━\n", "")


def test_what_a_given_encoding_of_the_terminal_lacks_is_escaped(tmp_path):
    code = "from handpose.utf8 import use_utf8; use_utf8(); print('━')"
    assert run_program("-c", code, cwd=tmp_path, locale={"PYTHONIOENCODING": "ascii"}) == (0, "\\u2501\n", "")


def test_a_program_that_is_told_not_to_use_utf_8_does_not_restart_for_ever(tmp_path, latin_1):
    code = "from handpose.utf8 import use_utf8; use_utf8(); print(1)"
    assert run_program("-X", "utf8=0", "-c", code, cwd=tmp_path, locale=latin_1, timeout=30)[:2] == (0, "1\n")


def test_a_name_that_is_not_utf_8_is_one_sentence(tmp_path, latin_1):
    for given in (os.fsdecode("data.root=Hände".encode("latin-1")), os.fsdecode("data.root='Hände'".encode("latin-1"))):
        status, _, err = run_program(REPOSITORY / "train.py", "data=freihand", given, cwd=tmp_path, locale=latin_1)
        assert status == 2
        assert re.fullmatch(r"error: data.root='?H\\xe4nde'? is not UTF-8, .*; rename the file or folder .*\n", err)


# --- files and names --------------------------------------------------------------------------------------------------


def test_a_file_is_read_without_its_byte_order_mark(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_bytes(b"\xef\xbb\xbf# Gr\xc3\xb6\xc3\x9fe\nheatmap.sigma: interval(0.03, 0.08)\n")
    assert read_utf8(file).startswith("# Größe")
    assert load_yaml(file) == {"heatmap.sigma": "interval(0.03, 0.08)"}
    assert load_space(str(file)).expressions == {"heatmap.sigma": "interval(0.03, 0.08)"}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_that_is_not_utf_8_is_named_with_the_place(tmp_path, mark):
    file = tmp_path / "space.yaml"
    file.write_bytes(mark + "a: ä\n".encode() + "b: ö, # Größe\n".encode("latin-1"))
    sentence = f"{file} is not UTF-8: byte 0xf6 in line 2, column 4; save the file in UTF-8"
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        load_space(str(file))


def test_a_best_file_that_is_not_utf_8_is_named(tmp_path):
    file = tmp_path / "best.yaml"
    file.write_bytes("# Größe\noverrides: []\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"best\.yaml is not UTF-8: byte 0xf6 in line 1, column 5"):
        compose("train", [f"best={file}"])


def test_an_environment_file_may_have_a_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MP_DATA", "")
    (tmp_path / ".env").write_text("MP_DATA=/data/Hände\n", encoding="utf-8-sig")
    load_dotenv_file()
    assert os.environ["MP_DATA"] == "/data/Hände"


def test_an_environment_file_that_is_not_utf_8_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("MP_DATA=/data/Hände\n", encoding="latin-1")
    sentence = f"({tmp_path / '.env'} is not UTF-8: byte 0xe4 in line 1, column 16"
    with pytest.raises(UserError, match=re.escape(sentence)):
        load_dotenv_file()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("# @package _global_\nseed: 7  # Größe\n".encode("latin-1"), "not UTF-8: byte 0xf6 in line 2, column 14"),
        ("# @package _global_\nseed: 7\n".encode("utf-8-sig"), "byte-order mark, which hides its # @package"),
    ],
)
def test_a_configuration_that_hydra_reads_wrongly_is_named(tmp_path, monkeypatch, content, sentence):
    shutil.copytree(config_files.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(config_files, "CONFIGS", tmp_path / "configs")
    file = tmp_path / "configs" / "experiment" / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(file))} .*{sentence}"):
        compose("train", ["experiment=mine"])


@pytest.mark.parametrize("value", ["/home/jürgen/Hände", "/データ/手 1", "/home/jürgen/Hände (2), neu", "'/Hände'"])
def test_a_path_with_any_letters_needs_no_quotes(value):
    assert compose("train", ["data=freihand", f"data.root={value}"]).data.root == value.strip("'")


# --- sources ----------------------------------------------------------------------------------------------------------


def needs_encoding(call):
    """Whether a call opens text in the encoding of the locale, as far as its source tells; the linter sees a part."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text", "FileHandler", "FileType", "TextIOWrapper"):
        return True
    if name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile"):
        mode = call.args[0] if call.args else given.get("mode")
        return isinstance(mode, ast.Constant) and "b" not in mode.value
    if {"text", "universal_newlines"} & set(given) and {"args", "capture_output", "stdout", "input"} & set(given):
        return True
    if name not in ("open", "fdopen"):
        return False
    is_path = isinstance(call.func, ast.Attribute) and name == "open"
    mode = given.get("mode", next(iter(call.args[0 if is_path else 1 :]), None))
    if mode is None:
        return not is_path or (not call.args and set(given) <= {"newline", "errors", "buffering"})
    return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and bool(TEXT_MODES.fullmatch(mode.value))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('a')", True),
        ("path.open('rb')", False),
        ("state.open(num_slots=2)", False),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("os.fdopen(descriptor, 'w')", True),
        ("subprocess.run(['a'], text=True, capture_output=True)", True),
        ("tempfile.TemporaryFile('w+')", True),
        ("tempfile.NamedTemporaryFile(dir=place)", False),
    ],
)
def test_a_call_in_the_encoding_of_the_locale_is_recognised(source, expected):
    assert needs_encoding(ast.parse(source, mode="eval").body) is expected


def test_no_source_opens_text_in_the_encoding_of_the_locale():
    found = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in [*SOURCES, REPOSITORY / "train.py", REPOSITORY / "tune.py"]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and needs_encoding(node)
    ]
    assert found == []


def test_every_program_begins_in_utf_8():
    programs = [path for path in SOURCES if path.is_relative_to(REPOSITORY / "benchmarks") is False]
    for path in programs:
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            assert 'if __name__ == "__main__":\n    use_utf8()\n' in text, path
