"""Measure what more networks are worth: ensembles, averages of weights, and distillation into one network.

    python benchmarks/ensembles.py --work FOLDER --output benchmarks/results/ensembles.json
    python benchmarks/ensembles.py --work FOLDER --root PHOTOGRAPHS --output benchmarks/results/ensembles_photos.json

The configuration that is best in benchmarks/curves (default; photographs with --root, a data set in FreiHAND's layout)
is the winner, and the next five are the other finalists. Everything is trained for 40 epochs on images of 64 pixels:

single      the winner with six seeds; the mean of their errors is what all others are compared with
joints      ensembles of three of them: joints relative to the root are averaged (what `retrain.predict=ensemble` does)
heatmaps    the same three, but their heatmaps are averaged before the read-out (arithmetic and geometric mean)
finalists   ensembles of three different finalists, one of which is the winner
greedy      up to five of all eleven networks, with repetition, chosen one after another by the validation split
            (Caruana et al. 2004)
soup        mean of the weights of networks that were fine-tuned from one start with other seeds (Wortsman et al. 2022)
distilled   the winner's network, trained on the truth and on the heatmaps of three others (Hinton et al. 2015); it
            costs as much as a single network when it is used

Errors are PA-MPJPE on the test split. The ratio to `single` has a 95 % bootstrap interval over the test hands. It does
not contain the chance of the trainings, which the spread of the six singles shows. An interrupted run continues.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from benchmarks.record_curves import CURVES, RECORDINGS, read_trainings  # noqa: E402
from benchmarks.result_files import format_machine, write_results  # noqa: E402
from handpose.config import compose, quote_override  # noqa: E402
from handpose.data.augment import to_view  # noqa: E402
from handpose.data.datamodule import OrderedBatches  # noqa: E402
from handpose.data.random_draws import BatchShare  # noqa: E402
from handpose.evaluation.scores import compute_joint_errors  # noqa: E402
from handpose.evaluation.trained_network import read_network  # noqa: E402
from handpose.evaluation.views import average_views  # noqa: E402
from handpose.heatmaps import AxisLogits, HeatmapTruth, compute_expected_coordinates  # noqa: E402
from handpose.losses import kl_divergence  # noqa: E402
from handpose.search.space import Params  # noqa: E402
from handpose.sweep.trainable.trial import add_param_overrides  # noqa: E402
from handpose.training.build import build_data  # noqa: E402
from handpose.training.checkpoints import read_checkpoint  # noqa: E402
from handpose.training.fit import RunFolders, fit  # noqa: E402
from handpose.training.module import HandPose  # noqa: E402

_EPOCHS, _FINE_TUNING_EPOCHS = 40, 12
_NUM_SEEDS, _NUM_FINALISTS, _NUM_GREEDY = 6, 5, 5
_TEACHER_WEIGHT = 0.5
Errors = NDArray[np.float64]


class Trainings:
    """Trains networks, or finds those that an earlier call has trained.

    Args:
        work: folder of the checkpoints.
        overrides: overrides of every training.
    """

    def __init__(self, work: Path, overrides: Sequence[str]) -> None:
        self._work, self._overrides = work, overrides

    def train(
        self, name: str, params: Params, seed: int, *, changes: Sequence[str] = (), teachers: Sequence[Path] = ()
    ) -> Path:
        """Train a network, and return its best checkpoint."""
        place = self._work / name
        done = place / "checkpoint.txt"
        if not done.exists():
            chosen = {**params, "seed": seed, "num_threads": 1}
            config = compose("train", [*add_param_overrides(self._overrides, chosen), "logger=none", *changes])
            callbacks = [_Distillation(teachers)] if teachers else []
            place.mkdir(parents=True, exist_ok=True)
            best = fit(config, RunFolders(place, place, place), callbacks=callbacks, quiet=True).best_checkpoint
            assert best is not None
            done.write_text(best.name, encoding="utf-8")
            print(f"trained {name}: {best.stem}", flush=True)
        return place / done.read_text(encoding="utf-8")


class _Distillation(pl.Callback):
    """Adds the mean heatmaps of teachers to the targets of a training."""

    def __init__(self, teachers: Sequence[Path]) -> None:
        self._teachers = [read_network(path).module for path in teachers]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        teachers = self._teachers

        def training_step(module: HandPose, batch: Any, batch_idx: int) -> Tensor:
            view = module.augment(batch, module._make_generator(), BatchShare.for_this_process())
            truth = HeatmapTruth(
                module.axes.encode(view.xyz_m, view.intrinsics, view.size), view.xyz_m, view.intrinsics, view.size
            )
            logits = module(view)
            with torch.no_grad():
                taught = average_heatmaps([teacher(view) for teacher in teachers])
            divergence = torch.stack(
                [
                    kl_divergence(axis, torch.softmax(target, dim=-1)).mean()
                    for axis, target in zip(logits, taught, strict=True)
                ]
            ).mean()
            distance = (compute_expected_coordinates(logits) - compute_expected_coordinates(taught)).abs().mean()
            terms = {
                name: (1 - _TEACHER_WEIGHT) * term for name, term in module.loss(logits, truth, module.axes).items()
            }
            weight: float = module.loss.heatmap_weight  # type: ignore[assignment]
            terms["teachers"] = _TEACHER_WEIGHT * (weight * divergence + 10.0 * distance)
            module._add_losses(terms, torch.stack(list(terms.values())).detach())
            return torch.stack(list(terms.values())).sum()

        pl_module.training_step = MethodType(training_step, pl_module)  # type: ignore[method-assign]


def average_heatmaps(outputs: Sequence[AxisLogits], *, geometric: bool = False) -> AxisLogits:
    """Return the logits of the mean heatmaps of several networks: the arithmetic or the geometric mean."""
    logs = [torch.log_softmax(torch.stack(axes), dim=-1) for axes in zip(*outputs, strict=True)]
    if geometric:
        return AxisLogits(*(each.mean(dim=0) for each in logs))
    return AxisLogits(*(torch.logsumexp(each, dim=0) for each in logs))


class Evaluation:
    """Predicts a split with networks.

    Args:
        config: the configuration of the data.
        split: `val` or `test`.
    """

    def __init__(self, config: Any, split: str) -> None:
        data = build_data(config, quiet=True)
        data.setup("test" if split == "test" else "fit")
        loader = data.test_dataloader() if split == "test" else data.val_dataloader()
        self._dataset: Any = loader.dataset
        self._outputs: dict[Path, list[AxisLogits]] = {}
        self._joints: dict[Path, Tensor] = {}

    def _iterate(self) -> Iterator[Any]:
        return iter(DataLoader(self._dataset, batch_size=None, sampler=OrderedBatches(self._dataset, batch_size=64)))

    @torch.no_grad()
    def _run(self, path: Path) -> None:
        if path in self._joints:
            return
        module = read_network(path).module
        assert isinstance(module, HandPose)
        views = [(to_view(batch), batch.scale_m) for batch in self._iterate()]
        self._outputs[path] = [module(view) for view, _ in views]
        decoded = [
            module.decode(out, view, scale_m) for out, (view, scale_m) in zip(self._outputs[path], views, strict=True)
        ]
        self._joints[path] = torch.cat(decoded)

    def measure(self, xyz_m: Tensor) -> Errors:
        """Return the PA-MPJPE of each hand, (N,) in mm."""
        dataset = self._dataset
        found = compute_joint_errors(xyz_m.double().numpy(), dataset.annotations.xyz_m, dataset.intrinsics.numpy())
        return found.aligned_mm.mean(axis=1)

    def measure_joints(self, paths: Sequence[Path]) -> Errors:
        """Return the errors of the mean joints of networks, (N,) in mm."""
        for path in paths:
            self._run(path)
        return self.measure(average_views(torch.stack([self._joints[path] for path in paths]).double()))

    @torch.no_grad()
    def measure_heatmaps(self, paths: Sequence[Path], *, geometric: bool) -> Errors:
        """Return the errors of the read-out of the mean heatmaps of networks, (N,) in mm."""
        for path in paths:
            self._run(path)
        first = read_network(paths[0]).module
        assert isinstance(first, HandPose)
        joints = [
            first.decode(average_heatmaps(outputs, geometric=geometric), to_view(batch), batch.scale_m)
            for batch, *outputs in zip(self._iterate(), *(self._outputs[path] for path in paths), strict=True)
        ]
        return self.measure(torch.cat(joints))


def choose_greedily(networks: Sequence[Path], measure: Callable[[Sequence[Path]], float], num: int) -> list[Path]:
    """Choose networks one after another, with repetition, as long as the error of their ensemble falls."""
    chosen: list[Path] = []
    best = np.inf
    for _ in range(num):
        errors = [measure([*chosen, network]) for network in networks]
        if min(errors) >= best:
            break
        best = min(errors)
        chosen.append(networks[int(np.argmin(errors))])
    return chosen


def write_soup(paths: Sequence[Path], file: Path) -> Path:
    """Write a checkpoint with the mean weights of others."""
    checkpoints = [read_checkpoint(path) for path in paths]
    mean = {
        name: torch.stack([each["state_dict"][name].double() for each in checkpoints]).mean(0).to(value.dtype)
        for name, value in checkpoints[0]["state_dict"].items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoints[0], "state_dict": mean}, file)
    return file


def train_networks(trainings: Trainings, params: Sequence[Params], work: Path) -> dict[str, list[Path]]:
    """Train everything that is compared. Return the checkpoints of each kind."""
    winner = params[0]
    seeds = [trainings.train(f"winner_{seed}", winner, seed) for seed in range(_NUM_SEEDS)]
    finalists = [trainings.train(f"finalist_{place}", each, 0) for place, each in enumerate(params[1:], start=2)]
    tuning = [f"trainer.max_epochs={_FINE_TUNING_EPOCHS}", quote_override("model.weights", str(seeds[0]))]
    slower = {**winner, "optimizer.lr": float(winner["optimizer.lr"]) / 4}
    tuned = [trainings.train(f"tuned_{seed}", slower, seed, changes=tuning) for seed in (10, 11, 12)]
    distilled = [trainings.train(f"distilled_{seed}", winner, seed, teachers=seeds[:3]) for seed in (20, 21, 22)]
    return {
        "single": seeds,
        "finalists": finalists,
        "tuned": tuned,
        "soup": [write_soup(tuned, work / "soup" / "soup.ckpt")],
        "distilled": distilled,
    }


def compare(networks: Mapping[str, Sequence[Path]], val: Evaluation, test: Evaluation) -> dict[str, list[Errors]]:
    """Return the errors on the test split, (N,) for each network or ensemble of each method."""
    seeds, finalists = networks["single"], networks["finalists"]
    threes = list(itertools.combinations(seeds, 3))
    mixed = [[seeds[0], *pair] for pair in itertools.combinations(finalists, 2)]
    everything = [*seeds, *finalists]
    greedy = choose_greedily(everything, lambda chosen: float(val.measure_joints(chosen).mean()), _NUM_GREEDY)
    print("greedy: " + ", ".join(path.parent.name for path in greedy), flush=True)
    return {
        "single": [test.measure_joints([path]) for path in seeds],
        "joints": [test.measure_joints(paths) for paths in threes],
        "heatmaps, arithmetic": [test.measure_heatmaps(paths, geometric=False) for paths in threes],
        "heatmaps, geometric": [test.measure_heatmaps(paths, geometric=True) for paths in threes],
        "all six": [test.measure_joints(seeds)],
        "finalists": [test.measure_joints(paths) for paths in mixed],
        "greedy": [test.measure_joints(greedy)],
        "tuned": [test.measure_joints([path]) for path in networks["tuned"]],
        "soup": [test.measure_joints(networks["soup"])],
        "distilled": [test.measure_joints([path]) for path in networks["distilled"]],
    }


_NUM_NETWORKS = {"joints": 3, "heatmaps, arithmetic": 3, "heatmaps, geometric": 3, "all six": 6, "finalists": 3}


def summarise(errors: Mapping[str, Sequence[Errors]], num_greedy: int = _NUM_GREEDY) -> list[dict[str, Any]]:
    """Return a row for each method: mean error, spread, and its ratio to a single network with an interval."""
    single = np.mean(errors["single"], axis=0)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(single), size=(4000, len(single)))
    rows = []
    for name, each in errors.items():
        hands = np.mean(each, axis=0)
        ratios = hands[drawn].mean(axis=1) / single[drawn].mean(axis=1)
        means = np.mean(each, axis=1)
        rows.append(
            {
                "method": name,
                "cost": num_greedy if name == "greedy" else _NUM_NETWORKS.get(name, 1),
                "pa_mpjpe_mm": float(hands.mean()),
                "deviation_mm": float(means.std(ddof=1)) if len(means) > 1 else None,
                "ratio": float(hands.mean() / single.mean()),
                "interval": [float(end) for end in np.quantile(ratios, (0.025, 0.975))],
            }
        )
    return rows


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained networks, which are kept")
    parser.add_argument("--root", type=Path, help="folder of photographs; without it, synthetic hands are used")
    parser.add_argument("--epochs", type=int, default=_EPOCHS, help=f"epochs of a training; default: {_EPOCHS}")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    name = "default" if given.root is None else "photographs"
    kept = [
        item
        for item in RECORDINGS[name].overrides
        if not item.startswith(("trainer.max_epochs", "data.source.num_eval"))
    ]
    overrides = [*kept, f"trainer.max_epochs={given.epochs}"]
    if given.root is None:
        overrides += ["data.source.num_eval=200", quote_override("paths.data", str(given.work / "data"))]
    else:
        overrides.append(quote_override("data.root", str(given.root.resolve())))
    overrides.append(quote_override("paths.output", str(given.work / "outputs")))
    networks = train_networks(Trainings(given.work, overrides), find_best_params(name), given.work)
    config = compose("train", overrides)
    rows = summarise(compare(networks, Evaluation(config, "val"), Evaluation(config, "test")))
    print(format_machine())
    print(format_table(rows))
    write_results(given.output, {"data": name, "epochs": given.epochs, "methods": rows})


def find_best_params(name: str) -> list[Params]:
    """Return the parameters of the best recorded configurations, the best one first."""
    complete = [
        row for row in read_trainings(CURVES / f"{name}.jsonl") if row["seed"] == 0 and len(row["seconds"]) == 27
    ]
    complete.sort(key=lambda row: row["metrics"]["val/pa_mpjpe_mm"][-1])
    return [row["params"] for row in complete[: 1 + _NUM_FINALISTS]]


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a table for a terminal."""
    lines = [f"{'method':<22}{'networks':>9}{'PA-MPJPE, mm':>14}{'between them':>14}{'x single':>10}   95 % interval"]
    for row in rows:
        deviation = "" if row["deviation_mm"] is None else f"{row['deviation_mm']:.2f}"
        low, high = row["interval"]
        lines.append(
            f"{row['method']:<22}{row['cost']:>9}{row['pa_mpjpe_mm']:>14.2f}{deviation:>14}{row['ratio']:>10.3f}   "
            f"{low:.3f} to {high:.3f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
