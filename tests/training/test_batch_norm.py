import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from handpose.training.batch_norm import CpuSyncBatchNorm, GpuSyncBatchNorm, SyncBatchNormPlugin
from tests.training.two_processes import run_in_two_processes


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.ReLU), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2, momentum=None)
    ).double()


def make_pictures():
    return 3.0 * torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1)).double() + 1.0


def train_two_steps(net, x):
    """Two steps' outputs and gradients, the loss being a mean over the pictures, and what the norms remember."""
    for _ in range(2):
        net.zero_grad()
        y = net(x)
        (y**3).mean().backward()
    return y.detach(), [parameter.grad for parameter in net.parameters()], dict(net.named_buffers())


def run_one_of_two(rank):
    net = SyncBatchNormPlugin(on_gpu=False).apply(make_network())
    return train_two_steps(net, make_pictures()[4 * rank :][:4])


@pytest.mark.slow
def test_two_processes_normalise_as_one_that_has_the_whole_batch(tmp_path):
    """Outputs, gradients averaged over the processes as DDP does it, and running statistics: against torch's."""
    (first, first_grads, buffers), (second, second_grads, others) = run_in_two_processes(run_one_of_two, tmp_path)
    whole, grads, expected = train_two_steps(make_network(), make_pictures())
    assert torch.allclose(torch.cat([first, second]), whole, atol=1e-12)
    for one, other, both in zip(first_grads, second_grads, grads, strict=True):
        assert torch.allclose((one + other) / 2, both, atol=1e-12)
    assert expected.keys() == buffers.keys()
    for name, value in expected.items():
        assert torch.allclose(buffers[name].double(), value.double(), atol=1e-12), name
        assert torch.equal(buffers[name], others[name])


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", ["lcnet_035", "efficientnet_lite0", "resnet18"])
def test_a_network_of_timm_keeps_its_activations_and_its_weights_their_names(name, on_gpu):
    """Torch's own conversion takes timm's activations away."""
    net = timm.create_model(name, features_only=True).eval()
    x = torch.randn(2, 3, 64, 64)
    before, names = net(x)[-1], list(net.state_dict())
    kind = GpuSyncBatchNorm if on_gpu else CpuSyncBatchNorm
    shared = SyncBatchNormPlugin(on_gpu=on_gpu).apply(copy.deepcopy(net))
    assert any(isinstance(module, kind) for module in shared.modules())
    assert torch.equal(shared(x)[-1], before)
    assert list(shared.state_dict()) == names
    again = SyncBatchNormPlugin(on_gpu=on_gpu).revert(shared)
    assert [type(module) for module in again.modules()] == [type(module) for module in net.modules()]
    assert torch.equal(again(x)[-1], before)


def test_what_is_learnt_is_in_the_norm_that_is_put_back():
    net = SyncBatchNormPlugin(on_gpu=False).apply(nn.Sequential(nn.BatchNorm2d(3)).double())
    net(make_pictures())
    net[0].weight.data.fill_(2.0)
    shared = copy.deepcopy(net.state_dict())
    back = SyncBatchNormPlugin(on_gpu=False).revert(net)
    assert type(back[0]) is nn.BatchNorm2d
    assert all(torch.equal(value, shared[name]) for name, value in back.state_dict().items())
    assert not torch.equal(back[0].running_mean, torch.zeros(3).double())
