"""How often Python looks for unreachable objects while a program starts."""

import gc

_USUAL = gc.get_threshold()
_WHILE_IMPORTING = (10_000, 10, 10)


def collect_rarely() -> None:
    """Look for unreachable objects rarely, while the libraries are imported.

    Importing PyTorch, Lightning and Ray makes a million objects, nearly all of which stay. Looking for others takes a
    seventh to a third of the time of the imports.
    """
    gc.set_threshold(*_WHILE_IMPORTING)


def collect_as_usual() -> None:
    """Look for unreachable objects as often as usual again, but not among those that exist by now.

    A training needs it: tensors in a cycle of references keep their memory until they are found.
    """
    if gc.get_threshold() == _WHILE_IMPORTING:
        gc.freeze()
        gc.set_threshold(*_USUAL)
