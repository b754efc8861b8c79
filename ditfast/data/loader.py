"""The order of the data as a function of (seed, step), and the loader that follows it."""

import hashlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ditfast.data.common import DataError, Dataset

Keys = list[tuple[int, bool]]


def epoch_order(size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """The permutation (size,) int64 of one epoch, and which sample indices (size,) bool are mirrored in it.

    The generator's seed is a hash, since torch's CPU generator uses the low 32 bits of a seed only.
    """
    digest = hashlib.sha256(f"ditfast data {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(size, generator=generator), torch.rand(size, generator=generator) < 0.5


class Loader:
    """Endless batches x (b, C, H, W) float32 and y (b,) int64, where b = global_batch / world_size.

    Sample p of a run is entry p % N of epoch p // N. Step s holds the `global_batch` samples from s * global_batch on,
    and each rank takes its contiguous slice of them. So batches may span epochs, no sample is dropped, resuming is
    starting at a step, and the data is the same for any number of ranks and workers. Datasets with `flip` are mirrored
    by a coin per (seed, epoch, sample). The global random state is neither read nor changed.

    start_step: the first step to hand out; the attribute `step` is the next one at any time.
    workers: processes that read ahead; 0 reads in the caller's. Close the loader, or use it in `with`, to stop them.
    pin_memory: page-locked batches, where there is a GPU.
    Raises DataError for a batch that the ranks cannot share, a negative start_step, an empty dataset, and, naming the
    sample, for an item of another shape or dtype, non-finite values, or a label out of range.
    """

    def __init__(
        self,
        dataset: Dataset,
        global_batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 0,
        start_step: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if global_batch < 1 or global_batch % world_size:
            raise DataError(
                f"global batch {global_batch} cannot be shared by {world_size} ranks; choose a multiple of {world_size}"
            )
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} is outside 0..{world_size - 1}")
        if start_step < 0:
            raise DataError(f"start_step {start_step}, expected 0 or more")
        if len(dataset) == 0:
            raise DataError("the dataset is empty")
        self.dataset, self.seed, self.step = dataset, seed, start_step
        self.local_batch = global_batch // world_size
        self._global_batch, self._first = global_batch, rank * self.local_batch
        loader: DataLoader[Any] = DataLoader(
            _Batches(dataset),  # type: ignore[arg-type]
            sampler=self._keys(start_step),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory and torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_ignore_signals,
        )
        with _held_back():
            self._batches: Iterator[tuple[Tensor, Tensor] | DataError] | None = iter(loader)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._batches is None:
            raise RuntimeError("this loader is closed")
        batch = next(self._batches)
        if isinstance(batch, DataError):
            raise batch
        self.step += 1
        return batch

    def close(self) -> None:
        """Stop the workers. May be called more than once."""
        # Dropping the iterator is not enough while the traceback of an error still refers to it.
        getattr(self._batches, "_shutdown_workers", lambda: None)()
        self._batches = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keys(self, step: int) -> Iterator[Keys]:
        """Per step from `step` on, this rank's (sample index, whether to mirror it)."""
        size, held, order, mirrored = len(self.dataset), -1, torch.empty(0), torch.empty(0)
        while True:
            start = step * self._global_batch + self._first
            keys = []
            for position in range(start, start + self.local_batch):
                epoch, place = divmod(position, size)
                if epoch != held:
                    held, (order, mirrored) = epoch, epoch_order(size, self.seed, epoch)
                index = int(order[place])
                keys.append((index, self.dataset.flip and bool(mirrored[index])))
            yield keys
            step += 1


class _Batches:
    """The dataset seen batch by batch: what a worker reads, checks and stacks at once."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, keys: Keys) -> tuple[Tensor, Tensor] | DataError:
        """A batch, or what is wrong with it: raised in a worker it would reach the user with a traceback as message."""
        try:
            return self._batch(keys)
        except DataError as error:
            return error

    def _batch(self, keys: Keys) -> tuple[Tensor, Tensor]:
        samples = [self._sample(index, mirror) for index, mirror in keys]
        x, y = torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])
        if not x.isfinite().all():
            bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
            raise DataError(f"sample {keys[bad][0]} of the dataset holds NaN or infinity")
        return x, y

    def _sample(self, index: int, mirror: bool) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        shape = (self.dataset.channels, *self.dataset.image_size)
        if image.shape != shape or image.dtype != torch.float32:
            raise DataError(
                f"sample {index} of the dataset is {image.dtype} {tuple(image.shape)}, expected torch.float32 {shape}"
            )
        if not 0 <= label < self.dataset.num_classes:
            raise DataError(
                f"sample {index} of the dataset has label {label}, expected 0..{self.dataset.num_classes - 1}"
            )
        return (image.flip(-1) if mirror else image), label


_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals to stop wait until the end, and in a process started meanwhile until it says what to do with them."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _ignore_signals(_: int) -> None:
    """Ctrl-C, torchrun and batch systems signal every process of a run; the main one decides when its workers stop."""
    for signum in _STOPPING:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
