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


OWN, OTHER = "False False True True True True", "True False True False True True"


@pytest.mark.parametrize(("program", "shown"), [("tune.py", OWN), ("mine/tune.py", OTHER), ("default_worker.py", OWN)])
def test_it_is_rare_only_until_a_program_of_this_project_begins(tmp_path, program, shown):
    """The package is a link in another folder, as a program of its own would find it there."""
    (tmp_path / "handpose").symlink_to(REPOSITORY / "handpose")
    code = f"import sys; sys.argv[0] = {str(REPOSITORY / program)!r}\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == shown.split()
