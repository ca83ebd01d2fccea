"""The course variant of FreiHAND, `freihand_dataset_MP`: folders train, val and test, cut from FreiHAND's training set.

A JSON entry belongs to four images: image i to entry i % n. The files are in metres and in FreiHAND's order of joints;
only the submission is in millimetres and AIT order. The test split has no joints, and no split has a scale.
"""

from dataclasses import replace
from pathlib import Path

from handpose.data.freihand import URL, read_annotations
from handpose.data.sample import Splits
from handpose.errors import UserError

_LAYOUT = "data.root must be the course's freihand_dataset_MP with train/, val/, test/ and their JSON files"


class FreiHandCourse:
    """Reader of the layout of the course's data set.

    Args:
        root: folder of the data set, always data.root.
    """

    name = "freihand_course"

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser().absolute()

    def splits(self) -> Splits:
        """Read the annotations and list the images. No image is opened.

        Raises:
            UserError: a folder or file is missing, broken or inconsistent with the others.
        """
        if not self.root.is_dir():
            problem = "is no folder" if self.root.exists() else "does not exist"
            raise UserError(
                f"data.root={self.root} {problem}; set it (or MP_DATA) to the course's freihand_dataset_MP, which "
                f"its teachers hand out, or use data=freihand with the public FreiHAND_pub_v2 ({URL})"
            )
        train = read_annotations(self.root / "train", self.root, "train", _LAYOUT, xyz="required")
        val = read_annotations(self.root / "val", self.root, "val", _LAYOUT, xyz="required")
        test = read_annotations(self.root / "test", self.root, "test", _LAYOUT, xyz="optional")
        after_train = int(train.pose.max()) + 1
        after_val = after_train + int(val.pose.max()) + 1
        return Splits(
            train=train,
            val=replace(val, pose=val.pose + after_train),
            test=replace(test, pose=test.pose + after_val),
        )
