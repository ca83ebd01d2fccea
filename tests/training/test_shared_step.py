"""A step of two processes is the step of one that has the whole batch."""

from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from handpose.config import compose
from handpose.data.random_draws import BatchShare
from handpose.data.sample import HandBatch
from handpose.heatmaps import HeatmapTruth
from handpose.training.batch_norm import SyncBatchNormPlugin
from handpose.training.build import build_training
from tests.training.conftest import SMALL
from tests.training.two_processes import run_in_two_processes

SIZE = 64


def make_hands():
    """16 of them, some joints off the axes, in double precision from the start."""
    generator = torch.Generator().manual_seed(3)
    xyz_m = 0.05 * torch.randn(16, 21, 3, generator=generator).double() + torch.tensor([0.0, 0.0, 0.5])
    intrinsics = torch.tensor([[200.0, 0, 31.5], [0, 200.0, 31.5], [0, 0, 1]]).double()
    image = torch.randint(0, 256, (16, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    mask = torch.zeros(16, 1, SIZE, SIZE, dtype=torch.uint8)
    scale_m, has_depth = torch.full((16,), 0.03), torch.ones(16, dtype=torch.bool)
    return HandBatch(image, intrinsics.repeat(16, 1, 1), xyz_m, scale_m, torch.arange(16), mask, has_depth)


def run_step(root, share):
    """Gradients and running statistics after a step."""
    torch.set_num_threads(1)
    module, _ = build_training(compose("train", [*SMALL, f"paths.data={root}", "augment=none"]), quiet=True)
    module.double().train()
    batch = HandBatch(
        *(field[16 // share.num_shares * share.rank :][: 16 // share.num_shares] for field in make_hands())
    )
    net = module.net
    if share.num_shares > 1:
        net = DistributedDataParallel(SyncBatchNormPlugin(on_gpu=False).apply(module.net))
    module.axes.fit(make_hands().xyz_m.float())
    view = module.augment(batch, torch.Generator().manual_seed(0), share)
    truth = HeatmapTruth(
        module.axes.encode(view.xyz_m, view.intrinsics, (SIZE, SIZE)), view.xyz_m, view.intrinsics, (SIZE, SIZE)
    )
    torch.stack(list(module.loss(net(view.image.double()), truth, module.axes).values())).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.net.named_parameters()}
    return gradients, dict(module.net.named_buffers()), float(truth.coordinates.sub(0.5).abs().gt(0.5).double().mean())


def run_one_of_two(root, rank):
    return run_step(root, BatchShare(rank, 2))


@pytest.mark.slow
def test_gradients_and_statistics_are_those_of_the_whole_batch(tmp_path):
    halves = run_in_two_processes(partial(run_one_of_two, tmp_path), tmp_path)
    (first, seen, off_first), (second, _, off_second) = halves
    gradients, statistics, off_axes = run_step(tmp_path, BatchShare())
    assert off_first != off_second  # the two have unequally many joints that count
    assert 0 < off_axes < 1
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(first[name], gradient, rtol=1e-9, atol=1e-12 * largest), name
        assert torch.equal(first[name], second[name])
    for name, value in statistics.items():
        assert torch.allclose(seen[name], value, rtol=1e-9), name
