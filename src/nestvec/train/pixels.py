"""Images as a trainer takes them: picked by row, hashed, measured, batched, embedded."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nestvec._pixels import EncodedImage, as_pixels
from nestvec.corpus.images import Images
from nestvec.encoders.image_network import ImageNetwork, Preprocessing

LARGEST = 224  # pixels a side, unless a size is asked for


class Numbers(Dataset[int]):
    """Row numbers; the batch is read and preprocessed as a whole."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> int:
        return row


@dataclass
class Batch:
    """Read and preprocess some rows; a class, so that workers of any kind can take it along."""

    images: Images
    preprocessing: Preprocessing
    rows: np.ndarray
    labels: np.ndarray

    def __call__(self, places: list[int]) -> dict[str, Tensor]:
        chosen = self.rows[places]
        return {
            "pixel_values": self.preprocessing(pick(self.images, chosen)),
            "labels": torch.from_numpy(self.labels[chosen]),
        }


def measured(images: Images, rows: np.ndarray, size: int | None) -> Preprocessing:
    """Return the size and channels of the first image, with mean and deviation of about 1,000.

    The size is at most 224 if it is not given: what a phone takes would not train on any machine.
    """
    height, width, channels = as_pixels(images.images[rows[0]]).shape
    side = size or min(max(height, width), LARGEST)
    plain = Preprocessing(side, 1 if channels < 3 else 3, mean=0, std=1)
    some = rows[:: max(1, len(rows) // 1000)]
    sums = torch.zeros(2, plain.n_channels, dtype=torch.float64)
    for start in range(0, len(some), 50):
        values = plain(pick(images, some[start : start + 50])).double()
        sums += torch.stack(
            [values.mean(dim=(2, 3)).sum(0), values.square().mean(dim=(2, 3)).sum(0)]
        )
    mean, square = sums / len(some)
    std = (square - mean.square()).clamp(min=1e-6).sqrt()
    return Preprocessing(side, plain.n_channels, mean.tolist(), std.tolist())


def image_hash(images: Images, rows: np.ndarray) -> str:
    """Return a hash of pixels, or of the paths and times of files, and of labels if there are."""
    digest = hashlib.sha256()
    if images.labels is not None:
        digest.update(np.ascontiguousarray(np.asarray(images.labels)[rows]).tobytes())
    for row in rows:
        one = images.images[row]
        if isinstance(one, (str, os.PathLike)):  # not opened: a large folder would take minutes
            digest.update(f"{one} {Path(one).stat().st_mtime_ns}".encode())
        elif isinstance(one, EncodedImage):
            digest.update(one.data)
        else:
            digest.update(np.ascontiguousarray(as_pixels(one)).data)
    return digest.hexdigest()[:16]


def pick(images: Images, rows: np.ndarray) -> Any:
    if isinstance(images.images, np.ndarray):
        return images.images[rows]
    return [images.images[row] for row in rows]


def embed_images(
    network: ImageNetwork,
    preprocessing: Preprocessing,
    images: Images,
    rows: np.ndarray,
    batch_size: int,
) -> Tensor:
    """Return the vectors (n, dim) of some images, where the network is."""
    device = next(network.parameters()).device
    parts = [
        network(preprocessing(pick(images, rows[i : i + batch_size])).to(device))
        for i in range(0, len(rows), batch_size)
    ]
    return torch.cat(parts)
