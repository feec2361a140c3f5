"""Batches in which no text stands twice, as far as the texts allow, and always as many batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import BatchSampler, SequentialSampler

_LOOK_AHEAD = 50  # batches' worth of rows that are tried before a batch takes a text twice


class BatchesApart(BatchSampler):
    """Deal rows into batches whose rows share no text: in InfoNCE the others are wrong answers.

    Where texts recur so often that a batch cannot be filled, it takes rows that share one. So there
    are always ``n // batch_size`` batches (sentence-transformers' sampler of that kind deals fewer
    than it promises, and a run that was interrupted then goes on in the wrong place).

    Parameters
    ----------
    columns
        The texts of each row, a list a column.
    batch_size
        Rows a batch; rows that do not fill a last one are left out of this epoch.
    seed
        Of the order, together with the epoch (`set_epoch`).
    """

    def __init__(self, columns: Sequence[Sequence[str]], *, batch_size: int, seed: int) -> None:
        n = len(columns[0])
        super().__init__(SequentialSampler(range(n)), batch_size, drop_last=True)
        number: dict[str, int] = {}
        self.texts = np.array(
            [[number.setdefault(text, len(number)) for text in column] for column in columns]
        ).T
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.texts) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        waiting = torch.randperm(len(self.texts), generator=generator).tolist()
        for _ in range(len(self)):
            batch: list[int] = []
            passed: list[int] = []
            taken: set[int] = set()
            place = 0
            most = min(len(waiting), _LOOK_AHEAD * self.batch_size)
            while len(batch) < self.batch_size and place < most:
                row = waiting[place]
                place += 1
                texts = self.texts[row].tolist()
                if taken.isdisjoint(texts):
                    taken.update(texts)
                    batch.append(row)
                else:
                    passed.append(row)
            n_missing = self.batch_size - len(batch)
            batch += passed[:n_missing]
            waiting = passed[n_missing:] + waiting[place:]
            yield batch
