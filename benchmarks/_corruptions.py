"""Corrupted images: noise, blur and JPEG at the strengths of CIFAR-10-C.

Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, arXiv:1903.12261. The constants are those of the code that made CIFAR-10-C, for
32 x 32 images: gaussian_noise, gaussian_blur and jpeg_compression. Values are rounded here, where
that code drops the fraction.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

Images = NDArray[np.uint8]

SEVERITIES = (1, 2, 3, 4, 5)
STRENGTHS = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, on the scale 0..1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation, pixels
    "jpeg": (80, 65, 58, 50, 40),  # PIL's quality
}


def corrupt(images: Images, kind: str, severity: int, seed: int = 0) -> Images:
    """Return images (n, h, w) or (n, h, w, c) uint8 corrupted: ``kind`` of STRENGTHS, 1 to 5.

    The seed matters for noise only; an image gets the same noise however many follow it.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"expected uint8 (n, h, w[, c]), got {images.dtype} {images.shape}")
    if kind not in STRENGTHS or severity not in SEVERITIES:
        raise ValueError(f"no corruption {kind!r} of severity {severity}: {STRENGTHS}")
    strength = STRENGTHS[kind][severity - 1]
    if kind == "noise":
        noise = np.random.default_rng(seed).standard_normal(images.shape, dtype=np.float32)
        return _rounded(images + np.float32(255 * strength) * noise)
    if kind == "blur":
        sigma = (0, strength, strength, 0)[: images.ndim]
        return _rounded(gaussian_filter(images.astype(np.float32), sigma, mode="nearest"))
    return np.stack([_through_jpeg(image, int(strength)) for image in images])


def _rounded(values: NDArray[Any]) -> Images:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _through_jpeg(image: Images, quality: int) -> Images:
    if image.shape[2:] == (1,):  # PIL's grey images have no axis for the channel
        return _through_jpeg(image[..., 0], quality)[..., None]
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))
