"""How often Python looks for garbage: rarely while a program imports, as usual when it works, unchanged for others."""

import subprocess
import sys

import pytest

from handpose.config_files import REPOSITORY

PROGRAM = """
import gc
usual = gc.get_threshold()
import handpose
print(gc.get_threshold() == usual, gc.get_freeze_count() > 0)
from handpose.program import exit_on_user_error
with exit_on_user_error():
    print(gc.get_threshold() == usual, gc.get_freeze_count() > 0)
    class Node: pass
    import weakref
    node = Node(); node.itself = node
    seen = weakref.ref(node)
    del node
    gc.collect()
    print(seen() is None, gc.isenabled())
"""


@pytest.mark.parametrize(
    ("name", "shown"), [("tune.py", "False False True True True True"), ("mine.py", "True False True False True True")]
)
def test_it_is_rare_only_until_a_program_of_this_project_begins(tmp_path, name, shown):
    (tmp_path / name).write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / name)],
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == shown.split()
