"""`python -m handpose.evaluation`: evaluate a checkpoint or a file of predictions. Writes scores and pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from handpose import drawing
from handpose.config import compose, is_group, use_given_extensions
from handpose.data.datamodule import HandDataModule, OrderedBatches, PackedHands
from handpose.dotenv_file import load_dotenv_file
from handpose.errors import UserError
from handpose.evaluation.confidence import compute_confidence_scores, draw_confidence
from handpose.evaluation.curves import draw_pck
from handpose.evaluation.ensemble import combine_split_predictions
from handpose.evaluation.hand_pictures import choose_hands, compute_radii_px
from handpose.evaluation.predict import SplitPredictions
from handpose.evaluation.score_table import make_table
from handpose.evaluation.scores import JointErrors, compute_joint_errors, compute_scores
from handpose.evaluation.submission import read_predictions, write_course
from handpose.evaluation.trained_network import list_checkpoints, list_data_overrides, list_network_overrides
from handpose.files import check_output_file, write_atomically, write_json
from handpose.geometry import project
from handpose.program import exit_on_user_error, make_parser
from handpose.training.build import build_data
from handpose.training.calibration import Calibration
from handpose.training.checkpoints import read_checkpoint
from handpose.training.fit import describe_hand_size, predict_loader, prepare_run
from handpose.utf8 import use_utf8

Split = Literal["train", "val", "test"]
_NUM_PICTURES = 8  # of the worst hands, and as many of the best

_DESCRIPTION = """\
Evaluate a checkpoint or a file of predictions on a split of its data set, and write metrics, plots and pictures. The
joints of the split must be known.

  python -m handpose.evaluation --checkpoint FILE
  python -m handpose.evaluation --checkpoint FILE data=freihand data.root=DIR test_time=rotations --split val
  python -m handpose.evaluation --predictions test_preds.json.gz data=freihand data.root=DIR

Overrides are those of train.py. A checkpoint contains the settings of its network and data set. A file of predictions
does not: without data=... the default data set is used.
"""


class _Predictions(NamedTuple):
    """The N images of a split with their true joints, and the predictions for them."""

    data: HandDataModule
    dataset: PackedHands
    xyz_m: NDArray[np.float64]  # (N, K, 3) predicted joints in metres
    error_m: NDArray[np.float64]  # (N, K) expected errors in metres; NaN if they are not known
    hand_size: str  # where it comes from, in words
    is_calibrated: bool = False  # whether the expected errors are, of all networks


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status; exit with 2 after a mistake of the user."""
    with exit_on_user_error():
        load_dotenv_file()
        options = _parse_arguments(arguments)
        use_given_extensions(options.overrides)
        source = options.checkpoint[0] if options.checkpoint else options.predictions
        if options.checkpoint and len(options.checkpoint) > 1 and options.output is None:
            raise UserError(
                "several --checkpoint predict together; give --output FOLDER for the results, so that those of a "
                "single one are kept"
            )
        beside = source if source.is_dir() else source.parent
        folder = options.output or beside / f"evaluation-{options.split}"
        if source.exists():  # otherwise reading it raises an error
            check_output_file(folder / "evaluation.json")
        if options.checkpoint:
            predicted = _predict_with_checkpoints(options.checkpoint, options.split, options.overrides)
        else:
            predicted = _read_prediction_file(source, options.split, options.overrides)
        result = _evaluate(predicted, options.split, folder)
        named = ", ".join(map(str, options.checkpoint or [source]))
        about = {"of": named, "split": options.split, "data": predicted.data.source.name}
        result = about | {"hand_size": predicted.hand_size} | result
        write_json(folder / "evaluation.json", result, indent=2)
        print(
            f"{named} on the {options.split} split of {predicted.data.source.name}\n"
            f"hand size: {predicted.hand_size}\n\n{make_table(result)}\n\nresults     {folder}"
        )
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("handpose.evaluation", _DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        type=Path,
        action="append",
        metavar="FILE",
        help="checkpoint of a training; several (--checkpoint A --checkpoint B), or the folder retrain/combined of a "
        "sweep: the predictions of their networks are averaged",
    )
    source.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="file of predictions: test_preds.json.gz, pred.zip or pred.json",
    )
    parser.add_argument(
        "--split", choices=("test", "val", "train"), default="test", help="split to evaluate; default: test"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for the results; default: evaluation-SPLIT next to the file",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override of the configuration, as for train.py"
    )
    return parser.parse_intermixed_args(arguments)


def _predict_with_checkpoints(paths: Sequence[Path], split: Split, overrides: Sequence[str]) -> _Predictions:
    """Predict with one network or several. Data and hand size are those of the first."""
    checkpoints = list_checkpoints(paths)
    kinds = {read_checkpoint(path, key="--checkpoint")["config"]["heatmap"]["_target_"] for path in checkpoints}
    if len(kinds) > 1:
        raise UserError(f"networks with {' and '.join(sorted(kinds))} cannot predict together; give those of one kind")
    predictions = [_predict_with_checkpoint(path, split, overrides) for path in checkpoints]
    first = predictions[0]
    for path, predicted in zip(checkpoints, predictions, strict=True):
        if predicted.data.fingerprint != first.data.fingerprint:
            raise UserError(f"{path} was trained on other data than {checkpoints[0]}; give data=... data.root=...")
    combined = combine_split_predictions([SplitPredictions(each.xyz_m, each.error_m) for each in predictions])
    is_calibrated = all(each.is_calibrated for each in predictions)
    return first._replace(xyz_m=combined.xyz_m, error_m=combined.error_m, is_calibrated=is_calibrated)


def _predict_with_checkpoint(path: Path, split: Split, overrides: Sequence[str]) -> _Predictions:
    trained_with = read_checkpoint(path, key="--checkpoint")["config"]
    checkpoint_overrides = [*list_network_overrides(trained_with), *list_data_overrides(trained_with)]
    config = compose("train", [*_drop_overridden(checkpoint_overrides, overrides), *overrides])
    prepared = prepare_run(config, stage="test", checkpoint=path)
    if split != "test":
        prepared.data.setup("fit")
    dataset = _open_dataset(prepared.data, split)
    batches = OrderedBatches(dataset, batch_size=prepared.data.batch_size)
    loader = DataLoader(dataset, batch_size=None, sampler=batches)
    predicted = predict_loader(config, prepared, loader, quiet=False)
    hand_size, calibration = describe_hand_size(prepared, dataset.annotations), prepared.module.calibration
    return _Predictions(prepared.data, dataset, *predicted, hand_size, calibration != Calibration())


def _read_prediction_file(path: Path, split: Split, overrides: Sequence[str]) -> _Predictions:
    xyz_m = read_predictions(path)
    data = build_data(compose("train", overrides))
    data.setup("test" if split == "test" else "fit")
    dataset = _open_dataset(data, split)
    if len(dataset) != len(xyz_m):
        raise UserError(
            f"{path} has {len(xyz_m)} hands but the {split} split of {data.source.name} has {len(dataset)}; give the "
            "data and the --split of these predictions"
        )
    unknown = np.full(xyz_m.shape[:2], np.nan)
    return _Predictions(data, dataset, xyz_m, unknown, "as in the file of predictions")


def _drop_overridden(ours: Sequence[str], given: Sequence[str]) -> list[str]:
    """Drop those of our overrides that belong to a group for which another option is given, but keep the image size."""
    groups = [item for item in given if is_group(item.partition("=")[0])]
    another = tuple(f"{item.partition('=')[0].replace('/', '.')}." for item in groups if item not in ours)
    kept = [item for item in ours if item.startswith("data.image_size=") or not item.startswith(another)]
    return [item for item in kept if item.partition("=")[0] not in {group.partition("=")[0] for group in groups}]


def _open_dataset(data: HandDataModule, split: Split) -> PackedHands:
    """Return the images and true joints of a split, in its order.

    Raises:
        UserError: the split has no joints.
    """
    loader = {"train": data.train_dataloader, "val": data.val_dataloader, "test": data.test_dataloader}[split]()
    dataset = loader.dataset
    assert isinstance(dataset, PackedHands)
    if dataset.annotations.is_flat:
        raise UserError(
            f"the {split} split of {data.source.name} has 2-D keypoints only; for the error in pixels, give "
            "test=true to train.py"
        )
    if dataset.annotations.xyz_m is None:
        raise UserError(f"the {split} split of {data.source.name} has no joints to compare with; give --split val")
    return dataset


def _evaluate(predicted: _Predictions, split: Split, folder: Path) -> dict[str, Any]:
    """Compute the scores, and write the predictions, the curve and the pictures to the folder. Return the scores."""
    data, dataset, xyz_m, error_m, *_ = predicted
    truth_m, training_m = dataset.annotations.xyz_m, data.splits.train.xyz_m
    assert truth_m is not None
    if training_m is None:
        raise UserError(
            f"the training split of {data.source.name} has no joints in 3-D, of which scores need the mean pose"
        )
    intrinsics = dataset.intrinsics.double().numpy()
    names = [file.stem for file in dataset.annotations.files]
    write_course(folder / f"{split}_preds.json.gz", xyz_m)  # raises if a prediction is not finite, and makes the folder
    size = (dataset.packed.image_size, dataset.packed.image_size)
    result = compute_scores(xyz_m, truth_m, intrinsics, size=size, training_m=training_m, names=names)
    errors = compute_joint_errors(xyz_m, truth_m, intrinsics)
    curves = {
        "aligned": errors.aligned_mm,
        "root-relative": errors.root_relative_mm,
        "as predicted": errors.absolute_mm,
    }
    draw_pck(folder / "pck.png", curves)
    if confidence := compute_confidence_scores(1000.0 * error_m, errors.root_relative_mm):
        result["confidence"] = confidence | {"is_calibrated": predicted.is_calibrated}
        draw_confidence(folder / "confidence.png", confidence)
    _draw_hands(folder / "hands.png", predicted, truth_m, errors, names)
    return result


def _draw_hands(
    path: Path, predicted: _Predictions, truth_m: NDArray[np.float64], errors: JointErrors, names: Sequence[str]
) -> None:
    """Draw the worst hands, worst first, then the best, best first."""
    per_hand = errors.aligned_mm.mean(axis=1)
    kinds, indices = zip(*choose_hands(len(per_hand), per_hand, most=_NUM_PICTURES), strict=True)
    chosen = np.array(indices)
    batch = predicted.dataset[chosen]
    camera = batch.intrinsics.double()
    picture = drawing.draw_predictions(
        batch.image.permute(0, 2, 3, 1).numpy(),
        project(torch.from_numpy(predicted.xyz_m[chosen]), camera).numpy(),
        project(torch.from_numpy(truth_m[chosen]), camera).numpy(),
        radii_px=compute_radii_px(SplitPredictions(predicted.xyz_m, predicted.error_m), chosen, camera),
        captions=[f"{which}: {names[i]}, {per_hand[i]:.1f} mm" for which, i in zip(kinds, chosen, strict=True)],
    )
    with write_atomically(path) as part:
        Image.fromarray(picture).save(part, "PNG")


if __name__ == "__main__":
    use_utf8()
    raise SystemExit(main())
