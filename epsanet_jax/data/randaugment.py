"""RandAugment on the host (Cubuk et al., 2019, arXiv:1909.13719).

Operations and magnitudes are those of `torchvision.transforms.RandAugment` for PIL images, with its defaults:
nearest-neighbour interpolation and black fill.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_ENHANCERS = {
    'Brightness': ImageEnhance.Brightness,
    'Color': ImageEnhance.Color,
    'Contrast': ImageEnhance.Contrast,
    'Sharpness': ImageEnhance.Sharpness,
}


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
    """Returns {operation: (magnitude of each bin, whether the sign is random)} for images of one size.

    Args:
        num_bins: number of magnitudes, at least 2.
        width: width of the images in pixels.
        height: height of the images in pixels.
    """
    none = (0.0,) * num_bins
    bits = 8 - np.round(np.arange(num_bins, dtype=np.float32) / np.float32((num_bins - 1) / 4))
    return {
        'Identity': (none, False),
        'ShearX': (_linspace(0.0, 0.3, num_bins), True),
        'ShearY': (_linspace(0.0, 0.3, num_bins), True),
        'TranslateX': (_linspace(0.0, 150.0 / 331.0 * width, num_bins), True),
        'TranslateY': (_linspace(0.0, 150.0 / 331.0 * height, num_bins), True),
        'Rotate': (_linspace(0.0, 30.0, num_bins), True),
        'Brightness': (_linspace(0.0, 0.9, num_bins), True),
        'Color': (_linspace(0.0, 0.9, num_bins), True),
        'Contrast': (_linspace(0.0, 0.9, num_bins), True),
        'Sharpness': (_linspace(0.0, 0.9, num_bins), True),
        'Posterize': (tuple(bits.tolist()), False),
        'Solarize': (_linspace(255.0, 0.0, num_bins), False),
        'AutoContrast': (none, False),
        'Equalize': (none, False),
    }


def apply_op(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """Applies one operation.

    Args:
        image: RGB image.
        name: name of an operation of `augmentation_space`.
        magnitude: the meaning depends on the operation. 'ShearX', 'ShearY': slope, about the upper left
            corner. 'TranslateX', 'TranslateY': pixels to the right and down, truncated to an integer.
            'Rotate': degrees anticlockwise. 'Posterize': number of bits kept. 'Solarize': smallest value that
            is inverted. 'Brightness', 'Color', 'Contrast', 'Sharpness': Pillow's factor minus 1. Others: not
            used.
    """
    match name:
        case 'Identity':
            return image
        case 'ShearX':
            return _affine(image, (1.0, magnitude, 0.0, 0.0, 1.0, 0.0))
        case 'ShearY':
            return _affine(image, (1.0, 0.0, 0.0, magnitude, 1.0, 0.0))
        case 'TranslateX':
            return _affine(image, (1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0))
        case 'TranslateY':
            return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))))
        case 'Rotate':
            return image.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))
        case 'Brightness' | 'Color' | 'Contrast' | 'Sharpness':
            return _ENHANCERS[name](image).enhance(1.0 + magnitude)
        case 'Posterize':
            return ImageOps.posterize(image, int(magnitude))
        case 'Solarize':
            return ImageOps.solarize(image, magnitude)  # pyright: ignore[reportArgumentType]
        case 'AutoContrast':
            return ImageOps.autocontrast(image)
        case 'Equalize':
            return ImageOps.equalize(image)
    raise ValueError(f'no such operation: {name!r}')


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
