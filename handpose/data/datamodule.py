"""Batches of hands for Lightning: one gather from the packed images a batch, in an order that seed and epoch decide.

Nothing is asked of the Trainer: the samplers share the images among the processes themselves, and because they are
DistributedSamplers, Lightning leaves them as they are.
"""

import hashlib
import re
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from handpose.data.label_check import find_suspicious_labels, format_warning
from handpose.data.labels import share_labels
from handpose.data.masks import PackedMasks, pack_masks
from handpose.data.pack import PackedImages, pack
from handpose.data.random_draws import BatchShare
from handpose.data.sample import Annotations, HandBatch, ImageFiles, Splits, join_annotations
from handpose.data.shared_memory import PREFETCH, check_shared_memory, compute_batch_bytes, make_loader_error
from handpose.errors import UserError
from handpose.malloc import release_freed_memory
from handpose.skeleton import NUM_JOINTS

_BATCH_TIMEOUT_S = 300.0
"""For a batch from the processes of a loader, whose start includes their imports, maybe from a slow network disk."""
_LOADER_FAILURE = re.compile(r"timed out|exited unexpectedly|killed by signal|[Bb]us error|shared memory")
"""What torch (2.15) says when the processes of a loader have died or are stuck."""
_MIN_SHARED_IMAGES = 10_000  # whose annotations and paths, as JSON and text, are worth giving back


class DataSource(Protocol):
    """A reader of a data set."""

    name: str

    def splits(self) -> Splits: ...


class HandDataModule(pl.LightningDataModule):
    """The three splits of a data set as batches of uint8 images.

    source: reader of the data set. image_size: side in pixels that images are packed at, None for that of the files.
    batch_size: images a step on one device; training drops the rest of the epoch's last batch, the other splits drop
    nothing. pack_folder: where the packed images lie. seed: of the order of training. num_workers: processes that
    gather; 0 is fast unless the disk is slow. masks: give those of the training images too. train_on_val: train on the
    validation split as well. num_test_batches: load only the first batches of the test split. progress: show packing,
    and warnings of labels that look wrong, on stderr.
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
        num_test_batches: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size} must be at least 1")
        self.source = source
        self.batch_size = batch_size
        self.pack_folder = Path(pack_folder).expanduser().absolute()
        self.seed = seed
        self.num_workers = num_workers
        self.masks = masks
        self.train_on_val = train_on_val
        self.num_test_batches = num_test_batches
        self._packed_masks: PackedMasks | None = None
        self._requested_size = image_size
        self._progress = progress
        self._stores: dict[str, PackedImages] = {}
        self._checked: set[str] = set()  # splits
        self._rows: NDArray[np.int64] = np.empty(0, dtype=np.int64)  # in the store, of training, then validation images

    @cached_property
    def splits(self) -> Splits:
        """The annotations, read on first use; large ones are shared by all processes of the node."""
        return share_labels(self.source.splits(), self.pack_folder)

    @cached_property
    def training_annotations(self) -> Annotations:
        """The training split, with train_on_val the validation split after it."""
        return join_annotations(self.splits.train, self.splits.val) if self.train_on_val else self.splits.train

    @property
    def image_size(self) -> int:
        """Side in pixels of the images in a batch; packs them if need be."""
        return self._open_store("training").image_size

    @property
    def fingerprint(self) -> str:
        """Hash of what is trained and tested on: names and sizes of images, labels, splits; alike on all machines."""
        state = hashlib.sha256(f"{self._open_store('training').contents} {self._open_store('test').contents}".encode())
        for split in (self.splits.train, self.splits.val, self.splits.test):
            for array in (split.pose, split.intrinsics, split.xyz_m, split.scale_m):
                state.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return state.hexdigest()[:16]

    def prepare_data(self) -> None:
        """Make what lies on the disk: once a node, in one process. Without a Trainer, for every stage."""
        stage = None if self.trainer is None or self.trainer.state.fn is None else self.trainer.state.fn.value
        self.setup(stage)

    def setup(self, stage: str | None = None) -> None:
        """Open the packed images of a stage ("fit", "validate", "test", "predict"), or of all."""
        if stage in (None, "fit", "validate"):
            self._open_store("training")
            self._open_masks()
            self._check_labels("train")
            self._check_labels("val")
        if stage in (None, "test", "predict"):
            self._open_store("test")
            self._check_labels("test")

    def check_shared_memory(self, *, num_processes: int = 1) -> None:
        """Raise UserError where the batches of the loader's processes do not fit into the shared memory.

        num_processes: training processes on this machine, each of which has a loader.
        """
        needed = compute_batch_bytes(batch_size=self.batch_size, image_size=self.image_size, masks=self.masks)
        check_shared_memory(num_workers=self.num_workers, bytes_per_batch=needed, num_processes=num_processes)

    @rank_zero_only
    def _check_labels(self, split: Literal["train", "val", "test"]) -> None:
        """Warn once of the labels of a split that are far from the rest."""
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
        num_train = len(self.training_annotations)
        rank, num_replicas = BatchShare.for_this_process()
        if self.batch_size * num_replicas > num_train:
            raise UserError(
                f"data.batch_size={self.batch_size} on {num_replicas} device(s) is more than the {num_train} images of "
                f"the training split; choose at most {num_train // num_replicas}"
            )
        dataset = self._make_dataset("train")
        batches = ShuffledBatches(
            dataset, batch_size=self.batch_size, seed=self.seed, rank=rank, num_replicas=num_replicas
        )
        if self.trainer is not None:
            # Lightning 2.6 draws the first epoch's batches before it calls set_epoch, so a resumed run would start with
            # the order of epoch 0.
            batches.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return self._make_loader(dataset, batches)

    def val_dataloader(self) -> DataLoader[HandBatch]:
        return self._make_evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[HandBatch]:
        return self._make_evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[HandBatch]:
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
        how: dict[str, Any] = {"batch_size": None, "sampler": batches, "pin_memory": on_gpu}  # which yields batches
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
        """Position in the opened store of each image of a split, (N,)."""
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
        """Of all poses of training and validation, so that another split finds the same store."""
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
    """Gathers and pins the next two batches in a thread, so that a GPU that is quicker does not wait for them.

    On a CPU a plain DataLoader is as quick: a gather takes 0.1 ms of a step's 50, and the core is the same.
    """

    def __iter__(self) -> Iterator[HandBatch]:  # type: ignore[override]
        batches = super().__iter__()
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(next, batches, None) for _ in range(2))
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(thread.submit(next, batches, None))
                yield batch


class MultiprocessLoader(DataLoader[HandBatch]):
    """Gathers batches in processes; raises UserError where these have died or are stuck, as when memory is short."""

    def __iter__(self) -> Iterator[HandBatch]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if _LOADER_FAILURE.search(str(error)) is None:
                raise
            raise make_loader_error(self.num_workers, error) from error


class PackedHands(Dataset[HandBatch]):
    """One split; an item is a whole batch, gathered at once.

    rows: (N,) position in the store of each image of the split. masks: of its poses, if they are wanted.
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
        """The given images (positions in the split), in the given order; channels last in memory."""
        position = torch.as_tensor(images)
        gathered = np.take(self.packed.images, self.rows[images], axis=0)  # (B, H, W, 3)
        return HandBatch(
            image=torch.from_numpy(gathered).permute(0, 3, 1, 2),
            intrinsics=self.intrinsics[position],
            xyz_m=_select_or_nan(self.annotations.xyz_m, images, (NUM_JOINTS, 3)),
            # A scale that was measured on the joints is a part of the truth, which no prediction may see.
            scale_m=_select_or_nan(self.annotations.scale_m if self.annotations.is_scale_given else None, images, ()),
            position=position,
            mask=torch.from_numpy(self._get_masks(images, gathered.shape[1:3])),
        )

    def _get_masks(self, images: NDArray[np.int64], size: tuple[int, ...]) -> NDArray[np.uint8]:
        if self.masks is None:
            return np.empty((len(images), 0, *size), dtype=np.uint8)
        return self.masks.select(self.annotations.pose[images])[:, None]


class ShuffledBatches(DistributedSampler[Any]):
    """Batches of an order that is a function of (seed, epoch) alone, so that a resumed run goes on with the same order.

    All processes draw the same order and cut it into steps of num_replicas batches, of which each takes its own. What
    does not fill a step is left out of the epoch. Yields (batch_size,) positions in the split.
    """

    def __init__(
        self, dataset: PackedHands, *, batch_size: int, seed: int, rank: int = 0, num_replicas: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.dataset) // (self.batch_size * self.num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))  # type: ignore[arg-type]
        steps = order[: len(self) * self.num_replicas * self.batch_size]
        return iter(steps.reshape(len(self), self.num_replicas, self.batch_size)[:, self.rank])


class OrderedBatches(DistributedSampler[Any]):
    """Every image once, in order. Yields positions in the split, at most batch_size at a time.

    Process r takes images r, r + R, ... None is repeated to make the shares equal, which would bend the metrics;
    instead all processes cut their share into the same number of batches, so that none waits for another.
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


def _sort_by_file(splits: Splits) -> tuple[NDArray[np.int64], Annotations]:
    """Training and validation images in the order of their files, so that another split finds the same store.

    Returns the row of each training, then of each validation image, and what `pack` needs.
    """
    files = np.concatenate([splits.train.files.paths, splits.val.files.paths])
    order = np.argsort(files, kind="stable")
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    both = Annotations(
        files=ImageFiles(files),
        intrinsics=np.concatenate([splits.train.intrinsics, splits.val.intrinsics]),
        xyz_m=None,
        scale_m=None,
        pose=np.concatenate([splits.train.pose, splits.val.pose]),
    )
    return rows, both.select(order)


def _select_or_nan(
    values: NDArray[np.float64] | None, images: NDArray[np.int64], shape: tuple[int, ...]
) -> torch.Tensor:
    """The given images' values in float32; NaN where there are none."""
    if values is None:
        return torch.full((len(images), *shape), torch.nan)
    return torch.from_numpy(np.take(values, images, axis=0).astype(np.float32))
