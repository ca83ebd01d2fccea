"""The articulated right hand of the synthetic images: bones, joint limits, postural synergies and forward kinematics.

A few components explain most postures of real hands (Santello, Flanders and Soechting 1998). Here they are a common
curl, flexion of mcp against pip, a gradient from index to little finger, spread, and two components of the thumb.
Single fingers deviate a little, and sometimes some fingers are stretched and the others bent, as in pointing and
counting.

Lengths are in mm and angles in degrees. In the frame of the hand, x points towards the thumb, y towards the fingertips
and z out of the palm. The origin is the wrist.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from handpose import skeleton

Floats = NDArray[np.float64]


class HandShape(NamedTuple):
    """The bones of one person's hand in mm. The angles of the resting hand are the same for everybody.

    Attributes:
        carpus: (5, 3) thumb cmc and the four knuckles relative to the wrist, in the frame of the hand, hand flat.
        phalanges: (5, 3) lengths; of the thumb metacarpal, proximal, distal; of the others proximal, middle, distal.
        girth: factor on all radii of the flesh; 1 for the mean hand.
    """

    carpus: Floats
    phalanges: Floats
    girth: float


class HandPose(NamedTuple):
    """Joint angles in degrees. Flexion is positive. Fingers are index, middle, ring, little.

    Attributes:
        mcp: (4,) flexion.
        pip: (4,) flexion.
        dip: (4,) flexion.
        spread: (4,) abduction, positive towards the thumb.
        thumb: (4,) radial abduction and palmar abduction of the cmc, flexion of mcp and ip.
        cupping: flexion of the little finger's metacarpal; half as much for the ring finger.
    """

    mcp: Floats
    pip: Floats
    dip: Floats
    spread: Floats
    thumb: Floats
    cupping: float


class PosedHand(NamedTuple):
    """Joints and directions of the bones, in the frame of the hand.

    Attributes:
        joints: (K, 3) in mm.
        distal: (5, 3, 3) finger, phalanx, unit vector along the bone.
        palmar: (5, 3, 3) finger, phalanx, unit vector out of the side of the pads.
    """

    joints: Floats
    distal: Floats
    palmar: Floats


# From the wrist to the thumb cmc and to the knuckles: radiographic means (Buryanov and Kotiuk 2010) plus the carpus.
_CARPUS_MM = np.array([[21, 24, 9], [23, 87, 1], [2, 89, -2], [-16, 82, 0], [-31, 73, 5]], dtype=float)
_PHALANGES_MM = np.array(
    [[43, 33, 27], [42, 25, 22.5], [46.5, 28.5, 23.5], [43, 27, 23.5], [33.5, 20, 20.5]], dtype=float
)

LIMITS_DEG = {
    "mcp": (-20.0, 90.0),
    "pip": (-3.0, 108.0),
    "dip": (-3.0, 80.0),
    "spread": (-18.0, 18.0),
    "thumb_radial": (8.0, 68.0),
    "thumb_palmar": (0.0, 52.0),
    "thumb_mcp": (-8.0, 56.0),
    "thumb_ip": (-15.0, 78.0),
    "cupping": (0.0, 14.0),
}
"""Limits of the active range of motion of a healthy adult, slightly inside the extremes in the literature."""

SIZE_LIMITS = (0.88, 1.12)
"""Size of the smallest and the largest hand relative to the mean hand."""

BONE_VARIATION = 0.025
"""Standard deviation of the length of a single bone relative to the size of the hand. It is cut at two deviations."""

# Angle between a straight finger and y, positive towards the thumb, and roll of its flexion axis, which makes bent
# fingers converge.
_FAN_DEG = np.array([4.0, 0.5, -4.0, -10.0])
_ROLL_DEG = np.array([-4.0, 0.0, 5.0, 12.0])

# The mean, then the synergies. Columns: mcp 4, pip 4, spread 4, thumb 4 (radial, palmar, mcp, ip).
_MEAN_DEG = np.array([26, 30, 33, 34, 38, 42, 42, 40, 1, 0, 0, -1, 36, 27, 16, 20], dtype=float)
_SYNERGIES_DEG = np.array(
    [
        [22, 25, 26, 26, 30, 33, 33, 31, -2, -0.5, 1, 3, -7, 4, 8, 8],  # common curl
        [14, 14, 14, 14, -16, -16, -16, -16, 0, 0, 0, 0, 0, 6, -3, -4],  # mcp against pip
        [-13, -5, 8, 12, -17, -6, 9, 14, 1, 0, 0, -1, 0, 2, 2, 2],  # little finger against index finger
        [0, 0, 0, 0, 0, 0, 0, 0, 5, 1.2, -3, -7, 4, 0, 0, 0],  # spread
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -11, 13, 3, 0],  # opposition of the thumb
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -2, 0, 14, 20],  # flexion of the thumb
    ]
)
_DEVIATION_DEG = np.array([3.5, 3.5, 3.5, 3.5, 4, 4, 4, 4, 1.5, 1, 1.5, 2, 3, 3, 4, 5], dtype=float)
_PART_PROBABILITY = 0.2
_MAX_REDRAWS = 12
_MAX_OVERLAP_MM = 4.0


def draw_shape(rng: np.random.Generator) -> HandShape:
    """Draw the hand of a person: the size of all bones, a few per cent for each bone, and the girth."""
    size = float(np.clip(rng.normal(1.0, 0.06), *SIZE_LIMITS))
    bones = 1 + np.clip(rng.normal(0.0, BONE_VARIATION, 20), -2 * BONE_VARIATION, 2 * BONE_VARIATION)
    return HandShape(
        carpus=_CARPUS_MM * size * bones[:5, None],
        phalanges=_PHALANGES_MM * size * bones[5:].reshape(5, 3),
        girth=size * float(rng.uniform(0.9, 1.12)),
    )


def draw_pose(rng: np.random.Generator, shape: HandShape, variety: float = 1.0) -> HandPose:
    """Draw a posture within the limits whose thumb does not intersect the fingers.

    The thumb is drawn again while it overlaps a finger or the palm by more than a few millimetres. After some attempts
    the posture with the smallest overlap is used.

    Args:
        rng: generator of random numbers.
        shape: the bones.
        variety: factor on the synergies; 0: the mean posture with small deviations only.
    """
    weights = rng.normal(0.0, 1.0, len(_SYNERGIES_DEG))
    weights[0] = rng.uniform(-1.45, 1.65)  # uniform, so that open hands and fists occur often enough
    angles = _MEAN_DEG + variety * (weights @ _SYNERGIES_DEG) + _DEVIATION_DEG * rng.normal(size=16)
    if rng.random() < _PART_PROBABILITY * min(variety, 1.0):
        _part_fingers(angles, rng)
    best, least = _clip_to_limits(angles, rng), np.inf
    for _ in range(_MAX_REDRAWS):
        pose = _clip_to_limits(angles, rng)
        overlap = measure_thumb_overlap_mm(pose_hand(shape, pose))
        if overlap < least:
            best, least = pose, overlap
        if least <= _MAX_OVERLAP_MM:
            break
        angles[12:] = _MEAN_DEG[12:] + rng.normal(size=3) @ _SYNERGIES_DEG[[0, 4, 5], 12:]
    return best


def _part_fingers(angles: Floats, rng: np.random.Generator) -> None:
    """Stretch some of the four fingers and bend the others, in place, as in pointing and counting."""
    stretched = rng.random(4) < 0.5
    mcp, pip = angles[:4], angles[4:8]
    mcp[stretched] = rng.normal(6, 8, stretched.sum())
    pip[stretched] = rng.normal(10, 6, stretched.sum())
    mcp[~stretched] = rng.normal(62, 10, (~stretched).sum())
    pip[~stretched] = rng.normal(85, 10, (~stretched).sum())


def _clip_to_limits(angles: Floats, rng: np.random.Generator) -> HandPose:
    """Turn 16 raw angles into a pose. dip follows pip by two thirds, and bent fingers cannot spread."""
    mcp = np.clip(angles[:4], *LIMITS_DEG["mcp"])
    pip = np.clip(angles[4:8], *LIMITS_DEG["pip"])
    dip = np.clip(0.66 * pip + rng.normal(0, 4, 4), *LIMITS_DEG["dip"])
    spread = np.clip(angles[8:12] * (1 - 0.85 * np.clip(mcp / 80, 0, 1)), *LIMITS_DEG["spread"])
    limits = np.array([LIMITS_DEG[f"thumb_{name}"] for name in ("radial", "palmar", "mcp", "ip")])
    thumb = np.clip(angles[12:], limits[:, 0], limits[:, 1])
    cupping = float(np.clip(2 + 0.1 * (mcp[3] + pip[3]) / 2 + 0.1 * thumb[1], *LIMITS_DEG["cupping"]))
    return HandPose(mcp, pip, dip, spread, thumb, cupping)


def pose_hand(shape: HandShape, pose: HandPose) -> PosedHand:
    """Compute joints and bone directions by forward kinematics."""
    joints = np.zeros((skeleton.NUM_JOINTS, 3))
    distal, palmar = np.zeros((5, 3, 3)), np.zeros((5, 3, 3))
    carpus = shape.carpus.copy()
    for finger, share in ((3, 0.5), (4, 1.0)):
        carpus[finger] = _rotate_x(share * pose.cupping) @ carpus[finger]
    joints[1::4] = carpus
    distal[0], palmar[0] = _compute_thumb_directions(pose.thumb)
    for finger in range(4):
        base = _rotate_z(_FAN_DEG[finger] + pose.spread[finger]) @ _rotate_y(_ROLL_DEG[finger])
        angle = np.cumsum([pose.mcp[finger], pose.pip[finger], pose.dip[finger]])
        cosine, sine = np.cos(np.radians(angle))[:, None], np.sin(np.radians(angle))[:, None]
        distal[finger + 1] = cosine * base[:, 1] + sine * base[:, 2]
        palmar[finger + 1] = cosine * base[:, 2] - sine * base[:, 1]
    steps = np.cumsum(distal * shape.phalanges[..., None], axis=1)
    for segment in range(3):
        joints[2 + segment :: 4] = carpus + steps[:, segment]
    return PosedHand(joints, distal, palmar)


def _compute_thumb_directions(thumb: Floats) -> tuple[Floats, Floats]:
    """Return unit vectors along the three bones of the thumb and out of its pads, (3, 3) each."""
    radial, elevation = np.radians(thumb[:2])
    along = np.array([np.sin(radial) * np.cos(elevation), np.cos(radial) * np.cos(elevation), np.sin(elevation)])
    # The metacarpal rotates about its own axis during opposition: the pad faces the side of the index finger when the
    # thumb lies in the plane of the palm, and the pads of the fingers when it stands out of the plane.
    facing = np.radians(48 - 1.1 * thumb[1])
    pad = np.array([-np.cos(facing), -0.25, np.sin(facing)])
    pad -= (pad @ along) * along
    pad /= np.linalg.norm(pad)
    angle = np.radians(np.cumsum([0.0, thumb[2], thumb[3]]))[:, None]
    return np.cos(angle) * along + np.sin(angle) * pad, np.cos(angle) * pad - np.sin(angle) * along


def measure_thumb_overlap_mm(hand: PosedHand) -> float:
    """Measure how deep the thumb is inside the fingers or the palm, in mm, from points along the bones.

    The result is negative if they do not overlap.
    """
    thumb = _sample_segments(hand.joints[[2, 3]], hand.joints[[3, 4]], 6)
    rest = list(range(5, skeleton.NUM_JOINTS))
    starts = hand.joints[[skeleton.PARENTS[joint] for joint in rest]]
    others = _sample_segments(starts, hand.joints[rest], 6)
    gap = np.linalg.norm(thumb[:, None] - others[None], axis=-1)
    return float(17.0 - gap.min())


def _sample_segments(starts: Floats, ends: Floats, count: int) -> Floats:
    share = np.linspace(0.2, 1.0, count)[:, None, None]
    return (starts + share * (ends - starts)).reshape(-1, 3)


def _rotate_x(angle_deg: float) -> Floats:
    cosine, sine = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])


def _rotate_y(angle_deg: float) -> Floats:
    cosine, sine = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])


def _rotate_z(angle_deg: float) -> Floats:
    """Return a rotation that turns y towards x for a positive angle, that is, a finger towards the thumb."""
    cosine, sine = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
