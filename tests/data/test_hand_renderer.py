"""The closed-form rays agree with marching along the signed distance, which shares no formula with them."""

import numpy as np
import pytest

from handpose.data import hand_kinematics, hand_renderer
from handpose.data.hand_renderer import SLEEVE, TIP, Flesh

INTRINSICS = np.array([[60.0, 0, 15], [0, 60.0, 16], [0, 0, 1]])
SIZE = 32


def make_flesh(start, end, start_radius, end_radius, kind=TIP):
    count = len(start_radius)
    return Flesh(
        np.array(start, float),
        np.array(end, float),
        np.array(start_radius, float),
        np.array(end_radius, float),
        palmar=np.tile([0.0, 0, -1], (count, 1)),
        origin=np.zeros(3),
        frame=np.eye(3),
        girth=1.0,
        kind=np.full(count, kind),
    )


def make_random_flesh(count, seed):
    rng = np.random.default_rng(seed)
    centre = np.array([0, 0, 300.0])
    start, end = rng.uniform(-50, 50, (2, count, 3)) + centre
    return make_flesh(start, end, rng.uniform(5, 14, count), rng.uniform(5, 14, count))


def compute_distance(points, flesh):
    """(P, N) signed distance to each cone: the least over spheres along the axis, by dense sampling."""
    share = np.linspace(0, 1, 4001)[:, None]
    columns = []
    for start, end, r0, r1 in zip(flesh.start, flesh.end, flesh.start_radius, flesh.end_radius, strict=True):
        centres, radii = start + share * (end - start), (r0 + share * (r1 - r0))[:, 0]
        columns.append(np.array([(np.linalg.norm(point - centres, axis=1) - radii).min() for point in points]))
    return np.stack(columns, axis=1)


def march_ray(ray, flesh):
    """Depth at which a ray (x, y, 1) enters the flesh, or infinity."""
    length, depth = np.linalg.norm(ray), 150.0
    while depth < 450:
        gap = compute_distance((ray * depth)[None], flesh).min()
        if gap < 1e-3:
            return depth
        depth += gap / length
    return np.inf


@pytest.mark.parametrize("seed", [0, 1])
def test_depth_agrees_with_ray_marching(seed):
    flesh = make_random_flesh(4, seed)
    surface = hand_renderer.trace_rays(flesh, INTRINSICS, SIZE, 1)
    top, bottom, left, right = surface.box
    picture = np.full((SIZE, SIZE), np.inf)
    picture[top:bottom, left:right] = surface.depth
    rng = np.random.default_rng(seed)
    hits = 0
    for row, column in rng.integers(0, SIZE, (80, 2)):
        expected = march_ray(np.linalg.inv(INTRINSICS) @ [column, row, 1], flesh)
        hits += np.isfinite(expected)
        assert picture[row, column] == pytest.approx(expected, abs=0.1)
    assert 15 < hits < 75


def test_normals_are_the_gradient_of_the_distance():
    flesh = make_random_flesh(3, 2)
    surface = hand_renderer.trace_rays(flesh, INTRINSICS, SIZE, 1)
    for pixel in range(0, surface.pixels.size, 7):
        point = surface.points[:, pixel].astype(float)
        steps = np.concatenate([np.eye(3), -np.eye(3)]) * 0.1
        gap = compute_distance(point + steps, flesh)[:, surface.cone[pixel]]
        np.testing.assert_allclose(surface.normal[:, pixel], (gap[:3] - gap[3:]) / 0.2, atol=0.03)


def test_the_nearer_cone_hides_the_other():
    flesh = make_flesh([[-30, 0, 300], [0, -30, 260]], [[30, 0, 300], [0, 30, 260]], [8, 8], [8, 8])
    surface = hand_renderer.trace_rays(flesh, INTRINSICS, SIZE, 1)
    top, _, left, _ = surface.box
    rows, columns = np.divmod(surface.pixels, surface.depth.shape[1])
    centre = (rows + top == 16) & (columns + left == 15)
    assert surface.cone[centre] == [1]
    assert set(surface.cone.tolist()) == {0, 1}


def test_a_cone_swallowed_by_its_own_sphere_is_drawn_as_the_sphere():
    flesh = make_flesh([[0, 0, 300]], [[2, 0, 300]], [20], [5])
    surface = hand_renderer.trace_rays(flesh, INTRINSICS, SIZE, 1)
    assert surface.pixels.size == pytest.approx(np.pi * (20 * 60 / 300) ** 2, rel=0.1)
    assert surface.depth.min() == pytest.approx(280, abs=0.5)


def test_nothing_in_view_gives_no_surface():
    flesh = make_flesh([[4000, 0, 300]], [[4010, 0, 300]], [8], [8])
    assert hand_renderer.trace_rays(flesh, INTRINSICS, SIZE, 2) is None


def test_supersampled_cover_is_the_cover_of_a_larger_picture():
    flesh = make_random_flesh(3, 4)
    twice = np.array([[120.0, 0, 30.5], [0, 120.0, 32.5], [0, 0, 1]])  # corners kept: u' = 2 (u + 0.5) - 0.5
    fine = hand_renderer.trace_rays(flesh, INTRINSICS, SIZE, 2)
    large = hand_renderer.trace_rays(flesh, twice, 2 * SIZE, 1)
    assert fine.pixels.size == large.pixels.size
    assert np.sort(fine.points[2]) == pytest.approx(np.sort(large.points[2]), rel=1e-5)


def test_joints_lie_in_the_flesh_and_a_sleeve_starts_where_it_is_said_to():
    rng = np.random.default_rng(0)
    forearm = np.array([0.0, -240, 0])
    for _ in range(5):
        shape = hand_kinematics.draw_shape(rng)
        hand = hand_kinematics.pose_hand(shape, hand_kinematics.draw_pose(rng, shape))
        flesh = hand_renderer.build_flesh(shape, hand, forearm, 90.0)
        assert compute_distance(hand.joints, flesh).min(axis=1).max() < 0
        cuff = flesh.start[flesh.kind == SLEEVE]
        assert cuff[:, 1] == pytest.approx(-90)


def test_moved_flesh_keeps_its_shape():
    rng = np.random.default_rng(0)
    shape = hand_kinematics.draw_shape(rng)
    hand = hand_kinematics.pose_hand(shape, hand_kinematics.draw_pose(rng, shape))
    flesh = hand_renderer.build_flesh(shape, hand, np.array([0.0, -240, 0]), None)
    rotation = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    moved = flesh.transform(rotation, np.array([1.0, 2, 3]))
    assert moved.start[0] == pytest.approx(rotation @ flesh.start[0] + [1, 2, 3])
    np.testing.assert_allclose(
        np.linalg.norm(moved.end - moved.start, axis=1), np.linalg.norm(flesh.end - flesh.start, axis=1)
    )
