"""RandAugment on the host (Cubuk et al., 2019, arXiv:1909.13719).

Operations and magnitudes are those of `torchvision.transforms.RandAugment` for PIL pictures, with its
defaults: nearest neighbours, black where the picture has moved away.
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
    """Applies operations that are drawn evenly, with replacement, from the 14 of `augmentation_space`.

    Attributes:
        num_ops: how many, one after the other.
        magnitude: of all of them, 0 .. num_magnitude_bins - 1.
        num_magnitude_bins: number of steps from the weakest to the strongest; at least 2.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Returns a picture of the same size; RGB in, RGB out."""
        for _ in range(self.num_ops):
            space = augmentation_space(self.num_magnitude_bins, picture.width, picture.height)
            name = list(space)[rng.integers(len(space))]
            magnitudes, signed = space[name]
            magnitude = magnitudes[self.magnitude]
            if signed and rng.integers(2):
                magnitude = -magnitude
            picture = apply_op(picture, name, magnitude)
        return picture


@functools.cache  # pictures arrive here in one size
def augmentation_space(num_bins: int, width: int, height: int) -> dict[str, tuple[tuple[float, ...], bool]]:
    """Returns {operation: (its magnitude for each bin, whether its sign is drawn)} for pictures of a size.

    Args:
        num_bins: at least 2.
        width: pixels.
        height: pixels.
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


def apply_op(picture: Image.Image, name: str, magnitude: float) -> Image.Image:
    """Applies one operation.

    Args:
        picture: RGB.
        name: one of `augmentation_space`.
        magnitude: of 'ShearX' and 'ShearY' the slope, about the upper left corner; of 'TranslateX' and
            'TranslateY' pixels to the right and down, cut to whole ones; of 'Rotate' degrees, anticlockwise;
            of 'Posterize' the bits that are kept; of 'Solarize' the value from which on pixels are inverted;
            of 'Brightness', 'Color', 'Contrast' and 'Sharpness' what is added to Pillow's factor 1; of the
            others without meaning.
    """
    match name:
        case 'Identity':
            return picture
        case 'ShearX':
            return _affine(picture, (1.0, magnitude, 0.0, 0.0, 1.0, 0.0))
        case 'ShearY':
            return _affine(picture, (1.0, 0.0, 0.0, magnitude, 1.0, 0.0))
        case 'TranslateX':
            return _affine(picture, (1.0, 0.0, -float(int(magnitude)), 0.0, 1.0, 0.0))
        case 'TranslateY':
            return _affine(picture, (1.0, 0.0, 0.0, 0.0, 1.0, -float(int(magnitude))))
        case 'Rotate':
            return picture.rotate(magnitude, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))
        case 'Brightness' | 'Color' | 'Contrast' | 'Sharpness':
            return _ENHANCERS[name](picture).enhance(1.0 + magnitude)
        case 'Posterize':
            return ImageOps.posterize(picture, int(magnitude))
        case 'Solarize':
            return ImageOps.solarize(picture, magnitude)  # pyright: ignore[reportArgumentType]
        case 'AutoContrast':
            return ImageOps.autocontrast(picture)
        case 'Equalize':
            return ImageOps.equalize(picture)
    raise ValueError(f'no operation {name!r}')


def _affine(picture: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    """Fills (x, y) from (a x + b y + c, d x + e y + f), with black from outside."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(0, 0, 0)
    )


def _linspace(start: float, end: float, num: int) -> tuple[float, ...]:
    """Returns what `torch.linspace` does: from both ends to the middle, with float32 steps, rounded once."""
    first, last = np.float32(start), np.float32(end)
    step, i = np.float64((last - first) / np.float32(num - 1)), np.arange(num)
    values = np.where(i < num // 2, first + step * i, last - step * (num - 1 - i))
    return tuple(values.astype(np.float32).tolist())
