"""RandAugment on the host (Cubuk et al., 2019, arXiv:1909.13719).

Operations and magnitudes are those of `torchvision.transforms.RandAugment` for PIL images, with its defaults:
nearest-neighbour interpolation and black fill.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies random operations, drawn uniformly with replacement from the 14 of `augmentation_space`.

    Attributes:
        num_ops: number of operations, applied in sequence.
        magnitude: magnitude of all operations, 0 .. num_magnitude_bins - 1.
        num_magnitude_bins: number of magnitudes from the weakest to the strongest; at least 2.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Returns an RGB image of the same size."""
        for _ in range(self.num_ops):
            space = augmentation_space(self.num_magnitude_bins, image.width, image.height)
            name = list(space)[rng.integers(len(space))]
            magnitudes, signed = space[name]
            magnitude = magnitudes[self.magnitude]
            if signed and rng.integers(2):
                magnitude = -magnitude
            image = apply_op(image, name, magnitude)
        return image


@functools.cache  # all images have the same size here
def augmentation_space(num_bins: int, width: int, height: int) -> dict[str, tuple[tuple[float, ...], bool]]:
    """Returns {operation: (magnitude of each of at least 2 bins, whether the sign is random)}.

    The width and the height of the images are in pixels.
    """
    none = (0.0,) * num_bins
    bits = 8 - np.round(np.arange(num_bins, dtype=np.float32) / np.float32((num_bins - 1) / 4))
    strongest = {
        'ShearX': 0.3,
        'ShearY': 0.3,
        'TranslateX': 150.0 / 331.0 * width,
        'TranslateY': 150.0 / 331.0 * height,
        'Rotate': 30.0,
        **dict.fromkeys(('Brightness', 'Color', 'Contrast', 'Sharpness'), 0.9),
    }
    return {
        'Identity': (none, False),
        **{name: (_linspace(0.0, end, num_bins), True) for name, end in strongest.items()},
        'Posterize': (tuple(bits.tolist()), False),
        'Solarize': (_linspace(255.0, 0.0, num_bins), False),
        'AutoContrast': (none, False),
        'Equalize': (none, False),
    }


def apply_op(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """Applies one operation to an RGB image.

    Args:
        image: RGB image.
        name: name of an operation of `augmentation_space`.
        magnitude: the meaning depends on the operation. 'ShearX', 'ShearY': slope, about the upper left
            corner. 'TranslateX', 'TranslateY': pixels to the right and down, truncated to an integer.
            'Rotate': degrees anticlockwise. 'Posterize': number of bits kept. 'Solarize': smallest value that
            is inverted. 'Brightness', 'Color', 'Contrast', 'Sharpness': Pillow's factor minus 1. Others: not
            used.
    """
    if name not in _OPERATIONS:
        raise ValueError(f'no such operation: {name!r}')
    return _OPERATIONS[name](image, magnitude)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Takes pixel (x, y) from (a x + b y + c, d x + e y + f), black outside of the image."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(0, 0, 0)
    )


def _linspace(start: float, end: float, num: int) -> tuple[float, ...]:
    """Returns the values of `torch.linspace`, which counts float32 steps from both ends to the middle."""
    first, last = np.float32(start), np.float32(end)
    step, i = np.float64((last - first) / np.float32(num - 1)), np.arange(num)
    values = np.where(i < num // 2, first + step * i, last - step * (num - 1 - i))
    return tuple(values.astype(np.float32).tolist())


_OPERATIONS: dict[str, Callable[[Image.Image, Any], Image.Image]] = {
    'Identity': lambda image, _: image,
    'ShearX': lambda image, slope: _affine(image, (1.0, slope, 0.0, 0.0, 1.0, 0.0)),
    'ShearY': lambda image, slope: _affine(image, (1.0, 0.0, 0.0, slope, 1.0, 0.0)),
    'TranslateX': lambda image, right: _affine(image, (1.0, 0.0, -float(int(right)), 0.0, 1.0, 0.0)),
    'TranslateY': lambda image, down: _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(down)))),
    'Rotate': lambda image, degrees: image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=(0, 0, 0)),
    'Brightness': lambda image, change: ImageEnhance.Brightness(image).enhance(1.0 + change),
    'Color': lambda image, change: ImageEnhance.Color(image).enhance(1.0 + change),
    'Contrast': lambda image, change: ImageEnhance.Contrast(image).enhance(1.0 + change),
    'Sharpness': lambda image, change: ImageEnhance.Sharpness(image).enhance(1.0 + change),
    'Posterize': lambda image, bits: ImageOps.posterize(image, int(bits)),
    'Solarize': ImageOps.solarize,
    'AutoContrast': lambda image, _: ImageOps.autocontrast(image),
    'Equalize': lambda image, _: ImageOps.equalize(image),
}
