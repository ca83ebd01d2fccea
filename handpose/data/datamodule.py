"""Batches of hands for Lightning. Each is one gather from the packed images; the order depends on seed and epoch.

The samplers distribute the images among the processes themselves. They are DistributedSamplers, so Lightning does not
replace them, whatever the settings of the Trainer.
"""

import copy
import hashlib
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from handpose.data.folds import Folds, divide_into_folds
from handpose.data.label_check import find_suspicious_labels, format_warning
from handpose.data.labels import share_labels
from handpose.data.masks import PackedMasks, pack_masks
from handpose.data.pack import PackedImages, pack
from handpose.data.random_draws import BatchShare
from handpose.data.sample import Annotations, HandBatch, Splits, join_annotations
from handpose.data.shared_memory import PREFETCH, check_shared_memory, compute_batch_bytes, make_loader_error
from handpose.errors import UserError
from handpose.malloc import release_freed_memory
from handpose.skeleton import NUM_JOINTS

_BATCH_TIMEOUT_S = 300.0
"""Maximum time for a batch from the worker processes. It includes their start, which may import from a slow network
disk."""
_LOADER_FAILURE = re.compile(r"timed out|exited unexpectedly|killed by signal|[Bb]us error|shared memory")
"""Messages of torch (2.15) when the processes of a data loader have died or are stuck."""
_MIN_SHARED_IMAGES = 10_000  # with this many, the memory freed after reading their annotations is worth returning


class DataSource(Protocol):
    """Interface of a reader of a data set. `splits` reads the annotations.

    Attributes:
        name: name of the data set, for messages.
    """

    name: str

    def splits(self) -> Splits: ...


class HandDataModule(pl.LightningDataModule):
    """The three splits of a data set as batches of uint8 images.

    Args:
        source: reader of the data set.
        image_size: side in pixels of the packed images; None: as in the files.
        batch_size: images in a step of one device. Training drops an incomplete last step of the epoch; the other
            splits drop nothing.
        pack_folder: folder of the packed images.
        seed: seed of the order of the training images.
        num_workers: processes that load batches; 0 is fast unless the disk is slow.
        masks: whether training batches contain masks.
        train_on_val: whether to train on the validation split as well.
        folds: the fold of the training and validation images that is the validation split, instead of the data set's
            own one; None, or one fold: the data set's own split.
        num_test_batches: load only this many batches of the test split in each process; None: all.
        progress: whether to show the progress of packing, and warnings of suspicious labels, on stderr.

    Raises:
        UserError: batch_size is less than 1, or train_on_val is combined with folds.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        image_size: int | None,
        batch_size: int,
        pack_folder: str,
        seed: int,
        num_workers: int = 0,
        masks: bool = False,
        train_on_val: bool = False,
        folds: Folds | None = None,
        num_test_batches: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size} must be at least 1")
        folds = folds or Folds()
        if train_on_val and folds.num > 1:
            raise UserError(
                f"train_on_val=true trains on all images, so that no fold of folds.num={folds.num} is held out; give "
                "train_on_val=false or folds.num=1"
            )
        self.source = source
        self.batch_size = batch_size
        self.pack_folder = Path(pack_folder).expanduser().absolute()
        self.seed = seed
        self.num_workers = num_workers
        self.masks = masks
        self.train_on_val = train_on_val
        self.folds = folds
        self.num_test_batches = num_test_batches
        self._packed_masks: PackedMasks | None = None
        self._requested_size = image_size
        self._progress = progress
        self._stores: dict[str, PackedImages] = {}
        self._checked: set[str] = set()  # splits, and the notes of the reader
        self._rows: NDArray[np.int64] = np.empty(0, dtype=np.int64)  # store row of each training, then val image

    @cached_property
    def splits(self) -> Splits:
        """The annotations, read on first use. All processes of the node share large ones."""
        if self.folds.num == 1:
            return self._own_splits
        return share_labels(divide_into_folds(self._own_splits, self.folds), self.pack_folder)

    @cached_property
    def _own_splits(self) -> Splits:
        """The annotations in the data set's own splits. Their groups are kept only if folds need them."""
        splits = self.source.splits()
        if self.folds.num == 1:
            train, val = (replace(split, group=None) for split in (splits.train, splits.val))
            splits = replace(splits, train=train, val=val)
        return share_labels(splits, self.pack_folder)

    def change_fold(self, index: int) -> "HandDataModule":
        """Return a data module that holds out another fold. It has the same annotations and packed images."""
        changed = copy.copy(self)
        changed.folds = replace(self.folds, index=index)
        for name in ("splits", "training_annotations"):
            changed.__dict__.pop(name, None)
        if "training" in changed._stores:
            changed._rows, _ = _sort_by_file(changed.splits)
        changed._checked = self._checked - {"train", "val"}
        return changed

    @cached_property
    def training_annotations(self) -> Annotations:
        """The training split; with train_on_val, the validation split follows."""
        return join_annotations(self.splits.train, self.splits.val) if self.train_on_val else self.splits.train

    @property
    def image_size(self) -> int:
        """Side in pixels of the images in a batch. Packs the images if necessary."""
        return self._open_store("training").image_size

    @property
    def fingerprint(self) -> str:
        """Hash of the names and sizes of the images, the labels and the data set's own splits.

        It depends neither on the machine nor on the folds.
        """
        state = hashlib.sha256(f"{self._open_store('training').contents} {self._open_store('test').contents}".encode())
        for split in (self._own_splits.train, self._own_splits.val, self._own_splits.test):
            for array in (split.pose, split.intrinsics, split.xyz_m, split.scale_m):
                state.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
            for array in (split.weight, split.rays):
                if array is not None:
                    state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()[:16]

    def prepare_data(self) -> None:
        """Pack the images of a stage on the disk. Lightning calls this once per node, in one process.

        Without a Trainer it prepares every stage.
        """
        stage = None if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        self.setup(stage)

    def setup(self, stage: str | None = None) -> None:
        """Open the packed images of a stage.

        Args:
            stage: "fit", "validate", "test" or "predict"; None: all of them.
        """
        self._print_notes()
        if stage in (None, "fit", "validate"):
            self._open_store("training")
            self._open_masks()
            self._check_labels("train")
            self._check_labels("val")
        if stage in (None, "test", "predict"):
            self._open_store("test")
            self._check_labels("test")

    def check_shared_memory(self, *, num_processes: int = 1) -> None:
        """Check that the batches of the data loaders' processes fit into shared memory.

        Args:
            num_processes: training processes on this machine. Each has its own loaders.

        Raises:
            UserError: they do not fit.
        """
        needed = compute_batch_bytes(batch_size=self.batch_size, image_size=self.image_size, masks=self.masks)
        check_shared_memory(num_workers=self.num_workers, bytes_per_batch=needed, num_processes=num_processes)

    @rank_zero_only
    def _print_notes(self) -> None:
        """Print once what the reader of the data set has to say."""
        if self._progress and "notes" not in self._checked:
            self._checked.add("notes")
            for note in self.splits.notes:
                print(f"note: {note}", file=sys.stderr, flush=True)

    @rank_zero_only
    def _check_labels(self, split: Literal["train", "val", "test"]) -> None:
        """Warn once about labels of a split that differ strongly from the rest."""
        if not self._progress or split in self._checked:
            return
        self._checked.add(split)
        annotations: Annotations = getattr(self.splits, split)
        rows = self._find_split_rows(split)
        packed = self._open_store("test" if split == "test" else "training")
        found = find_suspicious_labels(annotations, packed.intrinsics[rows], packed.image_size)
        if found:
            num_poses = len(np.unique(annotations.pose))
            print(format_warning(split, annotations.files, found, num_poses=num_poses), file=sys.stderr, flush=True)

    def train_dataloader(self) -> DataLoader[HandBatch]:
        """Return the data loader of the training split.

        Raises:
            UserError: a step needs more images than the split has.
        """
        num_train = len(self.training_annotations)
        rank, num_replicas = BatchShare.for_this_process()
        if self.batch_size * num_replicas > num_train:
            raise UserError(
                f"data.batch_size={self.batch_size} on {num_replicas} device(s) is more than the {num_train} images of "
                f"the training split; choose at most {num_train // num_replicas}"
            )
        dataset = self._make_dataset("train")
        batches = ShuffledBatches(
            dataset,
            batch_size=self.batch_size,
            seed=self.seed,
            weight=self.training_annotations.weight,
            rank=rank,
            num_replicas=num_replicas,
        )
        if self.trainer is not None:
            # Lightning 2.6 draws the first epoch's batches before it calls set_epoch, so a resumed run would start with
            # the order of epoch 0.
            batches.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return self._make_loader(dataset, batches)

    def val_dataloader(self) -> DataLoader[HandBatch]:
        """Return the data loader of the validation split."""
        return self._make_evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[HandBatch]:
        """Return the data loader of the test split."""
        return self._make_evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[HandBatch]:
        """Return the data loader of the test split."""
        return self._make_evaluation_loader("test")

    def _make_evaluation_loader(self, split: Literal["val", "test"]) -> DataLoader[HandBatch]:
        dataset = self._make_dataset(split)
        rank, num_replicas = BatchShare.for_this_process()
        return self._make_loader(
            dataset, OrderedBatches(dataset, batch_size=self.batch_size, rank=rank, num_replicas=num_replicas)
        )

    def _make_loader(
        self, dataset: "PackedHands", batches: "ShuffledBatches | OrderedBatches"
    ) -> DataLoader[HandBatch]:
        on_gpu = torch.cuda.is_available()
        how: dict[str, Any] = {"batch_size": None, "sampler": batches, "pin_memory": on_gpu}  # sampler of batches
        if self.num_workers == 0:
            return (PrefetchingLoader if on_gpu else DataLoader)(dataset, **how)
        return MultiprocessLoader(
            dataset,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH,
            persistent_workers=True,
            timeout=_BATCH_TIMEOUT_S,
            **how,
        )

    def _make_dataset(self, split: Literal["train", "val", "test"]) -> "PackedHands":
        store = self._open_store("test" if split == "test" else "training")
        if split == "train":
            rows = self._rows if self.train_on_val else self._find_split_rows("train")
            return PackedHands(self.training_annotations, store, rows, masks=self._open_masks())
        annotations, rows = getattr(self.splits, split), self._find_split_rows(split)
        if split == "test" and self.num_test_batches is not None:
            rows = rows[: self.num_test_batches * self.batch_size * BatchShare.for_this_process()[1]]
            annotations = annotations.select(rows)
        return PackedHands(annotations, store, rows)

    def _find_split_rows(self, split: Literal["train", "val", "test"]) -> NDArray[np.int64]:
        """Return the row in the opened store of each image of a split, (N,)."""
        if split == "test":
            return np.arange(len(self.splits.test))
        train, val = np.split(self._rows, [len(self.splits.train)])
        return train if split == "train" else val

    def _open_store(self, which: Literal["training", "test"]) -> PackedImages:
        if which not in self._stores:
            annotations = self.splits.test
            if which == "training":
                self._rows, annotations = _sort_by_file(self.splits)
            self._stores[which] = pack(
                annotations, image_size=self._requested_size, folder=self.pack_folder, progress=self._progress
            )
            if len(annotations) > _MIN_SHARED_IMAGES:
                release_freed_memory()
        sizes = {name: store.image_size for name, store in self._stores.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(
                f"training images have {sizes['training']} px but test images {sizes['test']} px; set data.image_size"
            )
        return self._stores[which]

    def _open_masks(self) -> PackedMasks | None:
        """Open the masks of all training and validation poses, so that the store does not depend on their split."""
        if not self.masks or self._packed_masks is not None:
            return self._packed_masks
        train = self.splits.train
        if train.masks is None:
            raise UserError(
                f"augment.background needs the masks of the hands, but data set {self.source.name} has none "
                "(FreiHAND_pub_v2 has them in training/mask); give augment.background=0"
            )
        poses = np.unique(np.concatenate([train.pose, self.splits.val.pose]))
        size = self._open_store("training").image_size
        self._packed_masks = pack_masks(
            train.masks, poses, image_size=size, folder=self.pack_folder, progress=self._progress
        )
        return self._packed_masks


class PrefetchingLoader(DataLoader[HandBatch]):
    """Data loader that gathers and pins the next two batches in a thread, so that a fast GPU does not wait for them.

    On a CPU a plain DataLoader is as fast: gathering takes 0.1 ms of a step of 50 ms, on the same core.
    """

    def __iter__(self) -> Iterator[HandBatch]:  # type: ignore[override]
        batches = super().__iter__()
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(next, batches, None) for _ in range(2))
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(next, batches, None))
                yield batch


class MultiprocessLoader(DataLoader[HandBatch]):
    """Data loader that gathers batches in processes.

    Iterating raises UserError if the processes have died or are stuck, for example when memory is short.
    """

    def __iter__(self) -> Iterator[HandBatch]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if _LOADER_FAILURE.search(str(error)) is None:
                raise
            raise make_loader_error(self.num_workers, error) from error


class PackedHands(Dataset[HandBatch]):
    """One split as a data set. An item is a whole batch, gathered at once.

    Args:
        annotations: annotations of the split.
        packed: the store of images.
        rows: (N,) row in the store of each image of the split.
        masks: masks of the poses; None: batches have no masks.
    """

    def __init__(
        self,
        annotations: Annotations,
        packed: PackedImages,
        rows: NDArray[np.int64],
        *,
        masks: PackedMasks | None = None,
    ) -> None:
        self.packed = packed
        self.rows = rows
        self.masks = masks
        self.intrinsics = torch.from_numpy(packed.intrinsics[rows])
        self.annotations = annotations

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, images: NDArray[np.int64]) -> HandBatch:
        """Gather a batch.

        Args:
            images: (B,) positions in the split.

        Returns:
            The images in the given order, channels last in memory.
        """
        position = torch.as_tensor(images)
        gathered = np.take(self.packed.images, self.rows[images], axis=0)  # (B, H, W, 3)
        xyz_m = _select_or_nan(self.annotations.xyz_m, images, (NUM_JOINTS, 3))
        rays = _select_or_nan(self.annotations.rays, images, (NUM_JOINTS, 3))
        has_depth = rays.isnan().all(dim=(1, 2))
        return HandBatch(
            image=torch.from_numpy(gathered).permute(0, 3, 1, 2),
            intrinsics=self.intrinsics[position],
            xyz_m=xyz_m.where(has_depth[:, None, None], rays),
            # A scale that was measured on the joints is part of the truth, which predictions must not use.
            scale_m=_select_or_nan(self.annotations.scale_m if self.annotations.is_scale_given else None, images, ()),
            position=position,
            mask=torch.from_numpy(self._get_masks(images, gathered.shape[1:3])),
            has_depth=has_depth,
        )

    def _get_masks(self, images: NDArray[np.int64], size: tuple[int, ...]) -> NDArray[np.uint8]:
        if self.masks is None:
            return np.empty((len(images), 0, *size), dtype=np.uint8)
        return self.masks.select(self.annotations.pose[images])[:, None]


class ShuffledBatches(DistributedSampler[Any]):
    """Sampler of training batches. The order depends only on (seed, epoch), so a resumed run continues with it.

    An epoch has as many images as the split. With weights, an image may be drawn several times in it, or not at all.
    All processes draw the same order and cut it into steps of num_replicas batches; each process takes one batch of a
    step. An incomplete last step is left out of the epoch. Yields (batch_size,) positions in the split.

    Args:
        dataset: the split.
        batch_size: images in a batch.
        seed: seed of the order.
        weight: as in `Annotations`.
        rank: index of this process.
        num_replicas: number of processes.
    """

    def __init__(
        self,
        dataset: PackedHands,
        *,
        batch_size: int,
        seed: int,
        weight: NDArray[np.float64] | None = None,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.batch_size = batch_size
        self.weight = weight

    def __len__(self) -> int:
        return len(self.dataset) // (self.batch_size * self.num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = draw_order(len(self.dataset), self.weight, rng)  # type: ignore[arg-type]
        steps = order[: len(self) * self.num_replicas * self.batch_size]
        return iter(steps.reshape(len(self), self.num_replicas, self.batch_size)[:, self.rank])


class OrderedBatches(DistributedSampler[Any]):
    """Sampler of evaluation batches that yields every image once, in order.

    Process r takes images r, r + R, ... No image is repeated to give all processes the same number, because that would
    distort the metrics. Instead all processes cut their images into the same number of batches, so that none waits for
    another. Yields at most batch_size positions in the split at a time.

    Args:
        dataset: the split.
        batch_size: largest number of images in a batch.
        rank: index of this process.
        num_replicas: number of processes.
    """

    def __init__(self, dataset: PackedHands, *, batch_size: int, rank: int = 0, num_replicas: int = 1) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.batch_size = batch_size

    def __len__(self) -> int:
        largest_share = -(-len(self.dataset) // self.num_replicas)  # type: ignore[arg-type]
        return -(-largest_share // self.batch_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        share = np.arange(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]
        return iter(np.array_split(share, len(self)))


def draw_order(num_images: int, weight: NDArray[np.float64] | None, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the images of an epoch, (num_images,) positions in random order.

    Args:
        num_images: number of images.
        weight: (num_images,) how often each image is drawn, relative to the others. The numbers of draws are exact to
            within 1, for each image and for all images of the same weight together (systematic sampling, Madow 1949).
            None: each image is drawn once.
        rng: source of the random numbers.
    """
    order = rng.permutation(num_images)
    if weight is None:
        return order
    order = order[np.argsort(weight[order], kind="stable")]
    expected = np.cumsum(weight[order]) * (num_images / weight.sum())
    expected[-1] = num_images  # not less by a rounding error
    until = np.floor(np.minimum(expected, num_images) + rng.random())
    times = np.diff(until, prepend=0.0).astype(np.int64)
    return rng.permutation(np.repeat(order, times))


def _sort_by_file(splits: Splits) -> tuple[NDArray[np.int64], Annotations]:
    """Sort training and validation images by file, so that the store does not depend on their split.

    Returns:
        The row of each training, then of each validation image; and the annotations that `pack` needs, in the order of
        the store.
    """
    both = join_annotations(splits.train, splits.val)
    order = np.argsort(both.files.paths, kind="stable")
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    both = replace(both, xyz_m=None, scale_m=None, weight=None, rays=None, masks=None, group=None)
    return rows, both.select(order)


def _select_or_nan(
    values: NDArray[np.float64] | None, images: NDArray[np.int64], shape: tuple[int, ...]
) -> torch.Tensor:
    """Return the values of the given images in float32; NaN if there are no values."""
    if values is None:
        return torch.full((len(images), *shape), torch.nan)
    return torch.from_numpy(np.take(values, images, axis=0).astype(np.float32))
