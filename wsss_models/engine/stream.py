"""The order of the samples, and their random numbers, as a function of the seed and the position in the stream.

Nothing is drawn from a generator with a history. So a continued run, a run with another number of loader processes and a
run on several training processes all see the same samples with the same augmentation.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..errors import InputError


def derive(*parts: Any) -> int:
    """A seed below 2³² from anything printable."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def local_seed(seed: int) -> Iterator[None]:
    """Python, NumPy and PyTorch (CPU) draw from this seed inside, and go on as before outside."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Batches:
    """Batch sampler over an endless stream of permutations: batch k is positions k·B … (k+1)·B − 1, split over the processes.

    Yields lists of (index, position). `first` and `last` count batches.
    """

    def __init__(self, count: int, batch: int, seed: int, first: int, last: int, rank: int = 0, processes: int = 1):
        self.count, self.batch, self.seed, self.first, self.last = count, batch, seed, first, last
        self.rank, self.share = rank, batch // processes
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.last - self.first

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng(derive(self.seed, "order", epoch)).permutation(self.count)
        return int(self._order[place])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.first, self.last):
            start = number * self.batch + self.rank * self.share
            yield [(self._index(position), position) for position in range(start, start + self.share)]


class Seeded(Dataset):
    """A data set whose samples draw their random numbers from the seed and their position.

    With `skip_bad` a sample that raises `InputError` is replaced by the next one that does not.
    """

    def __init__(self, dataset: Dataset, seed: int, skip_bad: bool):
        self.dataset, self.seed, self.skip_bad = dataset, seed, skip_bad

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[str]]:
        index, position = key
        count, bad = len(self.dataset), []
        for offset in range(count):
            try:
                with local_seed(derive(self.seed, "sample", position)):
                    return self.dataset[(index + offset) % count], bad
            except InputError as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error))
        raise InputError(f"no sample of {count} can be read; the first: {bad[0]}")


class Collate:
    """Batches of (sample, what could not be read)."""

    def __init__(self, collate=None):
        self.collate = collate or default_collate

    def __call__(self, pairs: list[tuple[Any, list[str]]]) -> tuple[Any, list[str]]:
        return self.collate([sample for sample, _ in pairs]), [text for _, bad in pairs for text in bad]


def loader(dataset: Dataset, batches: Batches, *, seed: int, skip_bad: bool, workers: int, collate=None, pin: bool = False) -> DataLoader:
    """A `DataLoader` that yields (batch, what could not be read)."""
    return DataLoader(
        Seeded(dataset, seed, skip_bad), batch_sampler=batches, collate_fn=Collate(collate), num_workers=workers, pin_memory=pin
    )
