"""The 21 joints of a hand: their names, the two orders in use, and the bones between them.

FreiHAND order (Zimmermann et al. 2019): wrist, then thumb, index, middle, ring and little finger, with four joints each
from base to tip. AIT order (the course variant): wrist, the five mcp, the five pip, the five dip, the five tips, each
thumb first. The project uses FreiHAND order everywhere; only the course's submission files are in AIT order.
"""

FINGERS = ("thumb", "index", "middle", "ring", "little")
_SEGMENTS = ("mcp", "pip", "dip", "tip")

JOINT_NAMES = ("wrist", *(f"{finger}_{segment}" for finger in FINGERS for segment in _SEGMENTS))
NUM_JOINTS = len(JOINT_NAMES)

PARENTS = (-1, *(0 if joint % 4 == 1 else joint - 1 for joint in range(1, NUM_JOINTS)))
"""Parent of each joint; the wrist has none (-1)."""

BONES = tuple((PARENTS[joint], joint) for joint in range(1, NUM_JOINTS))
"""(parent, child) of the 20 bones, in the order of the child."""

ROOT = 9
"""Joint that depths are relative to: the base of the middle finger, at the centre of the hand."""

REFERENCE_BONE = (9, 10)
"""Bone whose length FreiHAND publishes as `scale`: the proximal bone of the middle finger."""

AIT_FROM_FREIHAND = (0, *(1 + 4 * finger + segment for segment in range(4) for finger in range(5)))
"""`ait = freihand[AIT_FROM_FREIHAND]`."""

FREIHAND_FROM_AIT = tuple(AIT_FROM_FREIHAND.index(joint) for joint in range(NUM_JOINTS))
"""`freihand = ait[FREIHAND_FROM_AIT]`."""
