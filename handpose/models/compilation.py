"""torch.compile as an option, in place: the names of the weights in checkpoints stay the same."""

from typing import Literal

from torch import nn

from handpose.errors import UserError

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


def compile_in_place(net: nn.Module, mode: CompileMode) -> None:
    """Compile a network with torch.compile when it is first called, for each input shape, in train and in eval mode.

    Args:
        net: the network.
        mode: mode of torch.compile.

    Raises:
        UserError: there is no C++ compiler. Without this check the first call would fail in the middle of a run.
    """
    # Imported here because these modules take a second to import.
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
