"""torch.compile of a network, as an option: in place, so that its weights keep their names in checkpoints."""

from typing import Literal

from torch import nn

from handpose.errors import UserError

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


def compile_in_place(net: nn.Module, mode: CompileMode) -> None:
    """Have torch.compile translate the network when it is first called, with each shape and in train and eval mode.

    Raises UserError where there is no C++ compiler, which the first call would fail for in the middle of a run.
    """
    # These take a second to import, so only where they are used.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            f"model.compile={mode} needs a C++ compiler, which torch does not find on this machine; install g++, or "
            "give model.compile=null"
        ) from error
    net.compile(mode=mode)
