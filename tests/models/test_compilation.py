"""torch.compile as an option: its checkpoints are any other's, and what it needs is said."""

import shutil

import pytest
import torch
import torch._inductor.config
from torch import nn

from handpose.errors import UserError
from handpose.models.compilation import compile_in_place


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")


@pytest.mark.slow
def test_weights_keep_their_names(compiler):
    compiled = make_net()
    compile_in_place(compiled, "default")
    assert list(compiled.state_dict()) == list(make_net().state_dict())
    compiled.load_state_dict(make_net().state_dict())


def test_a_machine_without_a_compiler_is_a_sentence():
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"model\.compile=default needs a C\+\+ compiler.*model\.compile=null"),
    ):
        compile_in_place(make_net(), "default")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
def test_a_compiled_network_computes_the_same():
    compiled, plain = make_net(), make_net()
    compile_in_place(compiled, "default")
    image = torch.rand(2, 3, 16, 16)
    assert torch.allclose(compiled(image), plain(image), atol=1e-5)
    assert torch.allclose(compiled.eval()(image), plain.eval()(image), atol=1e-5)
