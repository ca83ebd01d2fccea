import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.transform import Rotation
from torch import Tensor

from handpose import geometry
from handpose.skeleton import BONES, REFERENCE_BONE, ROOT

quick = settings(derandomize=True, deadline=None, max_examples=25, database=None)
seeds = st.integers(0, 2**32 - 1)


def make_hands(num: int, seed: int = 0, *, metres: float = 0.7) -> Tensor:
    """(num, 21, 3) float64: five straight, slightly random fingers of plausible size, turned, in view of a camera."""
    rng = np.random.default_rng(seed)
    xyz = np.zeros((num, 21, 3))
    for finger in range(5):
        direction = np.array([0.25 * (finger - 2), 1.0, 0.0]) + 0.15 * rng.normal(size=(num, 3))
        for segment, reach in enumerate((0.085, 0.125, 0.150, 0.170)):
            xyz[:, 1 + 4 * finger + segment] = reach * direction + 0.01 * rng.normal(size=(num, 3))
    turned = np.einsum("nij,nkj->nki", Rotation.random(num, rng=rng).as_matrix(), xyz)
    shift = np.array([0, 0, metres]) + rng.uniform(-0.1, 0.1, size=(num, 1, 3))
    return torch.from_numpy(turned + shift)


def make_cameras(num: int, seed: int = 0) -> Tensor:
    """(num, 3, 3) float64 with skew, unequal focal lengths and a principal point far from the centre."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((num, 3, 3))
    matrix[:, 0, 0], matrix[:, 1, 1] = rng.uniform(200, 900, size=(2, num))
    matrix[:, 0, 1] = rng.uniform(-30, 30, size=num)
    matrix[:, :2, 2] = rng.uniform(-100, 400, size=(num, 2))
    matrix[:, 2, 2] = 1
    return torch.from_numpy(matrix)


def make_similarity(seed: int) -> tuple[Tensor, float, Tensor]:
    rng = np.random.default_rng(seed)
    rotation = torch.from_numpy(Rotation.random(rng=rng).as_matrix().copy())
    return rotation, float(rng.uniform(0.2, 5)), torch.from_numpy(rng.normal(size=3))


class TestCamera:
    @quick
    @given(seeds)
    def test_back_projection_undoes_projection(self, seed: int) -> None:
        xyz, intrinsics = make_hands(3, seed), make_cameras(3, seed)
        again = geometry.back_project(geometry.project(xyz, intrinsics), xyz[..., 2], intrinsics)
        torch.testing.assert_close(again, xyz, rtol=0, atol=1e-12)

    def test_projection_is_the_homogeneous_matrix_product(self) -> None:
        xyz, intrinsics = make_hands(5), make_cameras(5)
        homogeneous = np.einsum("nij,nkj->nki", intrinsics.numpy(), xyz.numpy())
        expected = homogeneous[..., :2] / homogeneous[..., 2:]
        np.testing.assert_allclose(geometry.project(xyz, intrinsics), expected, rtol=0, atol=1e-9)

    def test_projection_of_a_point_by_hand(self) -> None:
        intrinsics = torch.tensor([[100.0, 10.0, 50.0], [0.0, 200.0, 40.0], [0.0, 0.0, 1.0]])
        uv = geometry.project(torch.tensor([[1.0, -2.0, 4.0]]), intrinsics)
        assert uv.tolist() == [[100 * 0.25 + 10 * -0.5 + 50, 200 * -0.5 + 40]]

    def test_lengths_by_hand_and_none_behind_the_camera(self) -> None:
        intrinsics = torch.tensor([[100.0, 0.0, 50.0], [0.0, 200.0, 40.0], [0.0, 0.0, 1.0]])
        xyz = torch.tensor([[1.0, -2.0, 4.0], [1.0, 1.0, -4.0], [1.0, 1.0, 0.0]])
        lengths = geometry.project_lengths(torch.tensor([0.5, 0.5, 0.5]), xyz, intrinsics)
        assert lengths[0] == 100 * 0.5 / 4
        assert lengths[1:].isnan().all()

    def test_normalized_points_are_the_solution_of_the_linear_system(self) -> None:
        uv, intrinsics = geometry.project(make_hands(5), make_cameras(5)), make_cameras(5)
        homogeneous = np.concatenate((uv, np.ones((5, 21, 1))), axis=-1)
        rays = np.linalg.solve(intrinsics.numpy(), homogeneous.swapaxes(1, 2)).swapaxes(1, 2)
        np.testing.assert_allclose(geometry.normalize_image_points(uv, intrinsics), rays[..., :2], atol=1e-12)

    def test_leading_dimensions_are_a_batch_and_dtype_follows_the_input(self) -> None:
        xyz, intrinsics = make_hands(6).reshape(2, 3, 21, 3).float(), make_cameras(6).reshape(2, 3, 3, 3).float()
        uv = geometry.project(xyz, intrinsics)
        assert uv.shape == (2, 3, 21, 2)
        assert uv.dtype == torch.float32
        torch.testing.assert_close(uv[1, 2], geometry.project(xyz[1, 2], intrinsics[1, 2]), rtol=0, atol=0)

    def test_autocast_does_not_round_the_projection(self) -> None:
        xyz, intrinsics = make_hands(2).float(), make_cameras(2).float()
        expected = geometry.project(xyz, intrinsics)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(geometry.project(xyz, intrinsics), expected, rtol=0, atol=0)


class TestProcrustes:
    @pytest.mark.parametrize("reflection", [False, True])
    def test_agrees_with_scipy_to_a_millionth_of_a_millimetre(self, reflection: bool) -> None:
        target, predicted = 1000 * make_hands(40, 1), 1000 * make_hands(40, 2)
        predicted[::2] = predicted[::2] * torch.tensor([1.0, 1.0, -1.0])  # half of them are the other hand
        aligned = geometry.procrustes_align(predicted, target, reflection=reflection)
        independent = align_with_scipy_reflection if reflection else align_with_scipy
        expected = np.stack([independent(p, t) for p, t in zip(predicted.numpy(), target.numpy(), strict=True)])
        np.testing.assert_allclose(aligned, expected, rtol=0, atol=1e-6)

    def test_disparity_with_reflection_agrees_with_scipy_spatial(self) -> None:
        target, predicted = make_hands(10, 3), make_hands(10, 4)
        aligned = geometry.procrustes_align(predicted, target, reflection=True)
        squared = (aligned - target).square().sum(dim=(1, 2))
        size = (target - target.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
        expected = [scipy_procrustes(t, p)[2] for p, t in zip(predicted.numpy(), target.numpy(), strict=True)]
        np.testing.assert_allclose(squared / size, expected, rtol=0, atol=1e-12)

    @quick
    @given(seeds)
    def test_a_turned_scaled_and_shifted_hand_comes_back(self, seed: int) -> None:
        target = make_hands(2, seed)
        rotation, scale, shift = make_similarity(seed)
        aligned = geometry.procrustes_align(scale * target @ rotation.mT + shift, target)
        torch.testing.assert_close(aligned, target, rtol=0, atol=1e-12)

    @quick
    @given(seeds, st.booleans())
    def test_result_does_not_depend_on_the_predictions_own_frame(self, seed: int, reflection: bool) -> None:
        target, predicted = make_hands(2, seed), make_hands(2, seed + 1)
        rotation, scale, shift = make_similarity(seed)
        expected = geometry.procrustes_align(predicted, target, reflection=reflection)
        moved = geometry.procrustes_align(scale * predicted @ rotation.mT + shift, target, reflection=reflection)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-11)

    @quick
    @given(seeds)
    def test_no_other_similarity_comes_nearer(self, seed: int) -> None:
        target, predicted = make_hands(1, seed), make_hands(1, seed + 1)
        aligned = geometry.procrustes_align(predicted, target)
        least = (aligned - target).square().sum()
        rng = np.random.default_rng(seed)
        turn = torch.from_numpy(Rotation.from_rotvec(0.02 * rng.normal(size=3)).as_matrix().copy())
        centroid = aligned.mean(dim=1, keepdim=True)
        nearby = float(rng.uniform(0.97, 1.03)) * (aligned - centroid) @ turn + centroid + 1e-3 * rng.normal()
        assert (nearby - target).square().sum() >= least

    def test_a_mirrored_hand_fits_only_when_reflection_is_allowed(self) -> None:
        target = make_hands(4)
        mirrored = target * torch.tensor([-1.0, 1.0, 1.0])
        torch.testing.assert_close(
            geometry.procrustes_align(mirrored, target, reflection=True), target, rtol=0, atol=1e-12
        )
        errors = (geometry.procrustes_align(mirrored, target) - target).norm(dim=-1).mean(dim=-1)
        assert (errors > 1e-3).all()

    def test_batched_equals_one_by_one(self) -> None:
        target, predicted = make_hands(6, 5).reshape(2, 3, 21, 3), make_hands(6, 6).reshape(2, 3, 21, 3)
        batched = geometry.procrustes_align(predicted, target)
        for i in range(2):
            for j in range(3):
                alone = geometry.procrustes_align(predicted[i, j], target[i, j])
                torch.testing.assert_close(batched[i, j], alone, rtol=0, atol=1e-13)

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_point_comes_to_lie_on_the_targets_centroid(self, value: float, dtype: torch.dtype) -> None:
        target = make_hands(2).to(dtype)
        aligned = geometry.procrustes_align(torch.full((2, 21, 3), value, dtype=dtype), target)
        torch.testing.assert_close(aligned, target.mean(dim=1, keepdim=True).expand_as(target), rtol=0, atol=1e-7)

    def test_flat_and_straight_predictions_are_aligned(self) -> None:
        target = make_hands(2)
        for flattening in (torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])):
            flat = make_hands(2, 1) * flattening
            ours = geometry.procrustes_align(flat, target, reflection=True)
            expected = np.stack(
                [align_with_scipy_reflection(p, t) for p, t in zip(flat.numpy(), target.numpy(), strict=True)]
            )
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)
            unreflected = geometry.procrustes_align(flat, target)  # a flat hand is its own mirror image
            assert (unreflected - target).norm() == pytest.approx(float((ours - target).norm()), abs=1e-9)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_prediction_that_is_not_finite_spoils_only_its_own_hand(self, value: float) -> None:
        target, predicted = make_hands(2), make_hands(2, 1)
        expected = geometry.procrustes_align(predicted, target)
        predicted[0, 3, 1] = value
        aligned = geometry.procrustes_align(predicted, target)
        assert aligned[0].isnan().any()
        torch.testing.assert_close(aligned[1], expected[1], rtol=0, atol=0)

    def test_float32_is_computed_in_float64(self) -> None:
        target, predicted = make_hands(5, 1).float(), make_hands(5, 2).float()
        aligned = geometry.procrustes_align(predicted, target)
        expected = geometry.procrustes_align(predicted.double(), target.double()).float()
        assert aligned.dtype == torch.float32
        torch.testing.assert_close(aligned, expected, rtol=0, atol=0)


def align_with_scipy_reflection(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    source, goal = predicted - predicted.mean(axis=0), target - target.mean(axis=0)
    turn, segment = orthogonal_procrustes(source, goal)
    return source @ turn * segment / np.square(source).sum() + target.mean(axis=0)


def align_with_scipy(predicted: np.ndarray, target: np.ndarray) -> np.ndarray:
    source, goal = predicted - predicted.mean(axis=0), target - target.mean(axis=0)
    turned = Rotation.align_vectors(goal, source)[0].apply(source)
    return turned * (turned * goal).sum() / np.square(source).sum() + target.mean(axis=0)


class TestHand:
    def test_root_relative_hand_has_its_root_at_the_origin(self) -> None:
        xyz = make_hands(3)
        assert geometry.to_root_relative(xyz)[:, ROOT].abs().max() == 0
        torch.testing.assert_close(geometry.to_root_relative(xyz, 0) + xyz[:, :1], xyz)

    def test_bone_lengths_by_hand(self) -> None:
        xyz = torch.zeros(21, 3)
        xyz[10] = torch.tensor([3.0, 4.0, 0.0])  # the middle finger's pip joint: bones 9-10 and 10-11 reach it
        lengths = dict(zip(BONES, geometry.compute_bone_lengths(xyz).tolist(), strict=True))
        assert lengths.pop((9, 10)) == 5
        assert lengths.pop((10, 11)) == 5
        assert set(lengths.values()) == {0}


def project_hands(xyz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised image points, relative depth and bone lengths of hands (N, 21, 3)."""
    return xyz[..., :2] / xyz[..., 2:], xyz[..., 2] - xyz[..., ROOT, None, 2], geometry.compute_bone_lengths(xyz)


ONE_BONE = torch.tensor([float(bone == REFERENCE_BONE) for bone in BONES], dtype=torch.float64)


class TestRootDepth:
    @quick
    @given(seeds)
    def test_is_exact_for_the_truth(self, seed: int) -> None:
        xyz = make_hands(4, seed)
        torch.testing.assert_close(geometry.solve_root_depth(*project_hands(xyz)), xyz[:, ROOT, 2], rtol=0, atol=1e-12)

    @quick
    @given(seeds)
    def test_one_bone_gives_the_truth_or_the_greater_depth_that_looks_the_same(self, seed: int) -> None:
        xyz = make_hands(4, seed)
        points, relative, lengths = project_hands(xyz)
        depth, truth = geometry.solve_root_depth(points, relative, lengths, ONE_BONE), xyz[:, ROOT, 2]
        # A bone that points at the camera is a double root, near which only half of the digits remain.
        is_true = (depth - truth).abs() <= 1e-6
        assert (is_true | (depth > truth)).all()
        again = torch.cat((points, torch.ones_like(depth)[:, None, None].expand(-1, 21, 1)), dim=-1)
        again = again * (depth[:, None] + relative)[..., None]
        bone = BONES.index(REFERENCE_BONE)
        torch.testing.assert_close(geometry.compute_bone_lengths(again)[:, bone], lengths[:, bone], rtol=0, atol=1e-12)

    def test_one_bone_solves_the_equation_of_its_length(self) -> None:
        points, relative, lengths = project_hands(make_hands(5))
        lengths = lengths * 1.1  # no longer the truth, so only the equation itself can agree
        depth = geometry.solve_root_depth(points, relative, lengths, ONE_BONE)
        z = depth[:, None] + relative
        xyz = torch.cat((points * z[..., None], z[..., None]), dim=-1)
        bone = BONES.index(REFERENCE_BONE)
        torch.testing.assert_close(geometry.compute_bone_lengths(xyz)[:, bone], lengths[:, bone], rtol=0, atol=1e-12)

    def test_all_bones_are_better_than_one_under_noise(self) -> None:
        xyz = make_hands(300, 7)
        points, relative, lengths = project_hands(xyz)
        noise = torch.Generator().manual_seed(0)
        points = points + 0.004 * torch.randn(points.shape, generator=noise, dtype=torch.float64)  # 2 px at f = 500
        relative = relative + 0.004 * torch.randn(relative.shape, generator=noise, dtype=torch.float64)
        error = {
            name: (geometry.solve_root_depth(points, relative, lengths, weights) - xyz[:, ROOT, 2]).abs().median()
            for name, weights in (("one", ONE_BONE), ("all", None))
        }
        assert error["all"] < 0.5 * error["one"]
        assert error["all"] < 0.03

    def test_without_a_real_root_the_nearest_depth_is_taken(self) -> None:
        points, relative, lengths = project_hands(make_hands(20))
        depth = geometry.solve_root_depth(points, relative, 0 * lengths)  # no hand has bones of length 0
        assert depth.isfinite().all()
        candidates = depth[:, None] + torch.linspace(-0.05, 0.05, 101, dtype=torch.float64)  # (20, 101)
        z = candidates[..., None] + relative[:, None]
        xyz = torch.cat((points[:, None] * z[..., None], z[..., None]), dim=-1)
        squared = geometry.compute_bone_lengths(xyz).square().sum(dim=-1)
        in_front = (z >= 0).all(dim=-1)
        assert (squared.where(in_front, torch.inf).amin(dim=1) >= squared[:, 50] - 1e-12).all()

    def test_every_joint_lies_in_front_of_the_camera(self) -> None:
        points, relative, lengths = project_hands(make_hands(20))
        depth = geometry.solve_root_depth(100 * points, 30 * relative, lengths)
        nearest = (depth[:, None] + 30 * relative).amin(dim=1)
        torch.testing.assert_close(nearest, geometry.MIN_DEPTH * lengths.mean(dim=1))

    def test_the_unit_of_length_is_free(self) -> None:
        points, relative, lengths = project_hands(make_hands(20))
        relative = relative + 0.01 * torch.sin(100 * relative)  # not the truth, so that every step of it counts
        metres = geometry.solve_root_depth(points, relative, lengths)
        torch.testing.assert_close(geometry.solve_root_depth(points, 1000 * relative, 1000 * lengths), 1000 * metres)

    def test_coinciding_points_give_a_finite_depth_and_gradient(self) -> None:
        points = torch.zeros(2, 21, 2, requires_grad=True)
        depth = geometry.solve_root_depth(points, torch.zeros(2, 21), torch.full((20,), 0.03))
        depth.sum().backward()
        assert depth.isfinite().all()
        assert points.grad is not None
        assert points.grad.isfinite().all()

    def test_gradient_is_finite_without_a_real_root(self) -> None:
        points, relative, lengths = project_hands(make_hands(20))
        points.requires_grad_()
        geometry.solve_root_depth(points, relative, 0.1 * lengths).sum().backward()
        assert points.grad is not None
        assert points.grad.isfinite().all()

    def test_lengths_of_one_hand_serve_a_batch(self) -> None:
        xyz = make_hands(1).expand(3, -1, -1)
        points, relative, lengths = project_hands(xyz)
        torch.testing.assert_close(geometry.solve_root_depth(points, relative, lengths[0]), xyz[:, ROOT, 2])
