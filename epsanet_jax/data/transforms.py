"""Decoding, cropping and resizing of single pictures on the host; all randomness comes in as a generator."""

import dataclasses
import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from epsanet_jax.errors import InputError, one_line


class BadImageError(InputError):
    """A picture cannot be decoded."""


def decode(image: bytes | np.ndarray) -> Image.Image:
    """Decodes a picture of any kind Pillow reads to RGB.

    Alpha is dropped, gray is repeated, 16 bits become the upper 8, EXIF orientation is ignored (as in
    torchvision's ImageFolder).

    Args:
        image: the bytes of a file, or an uint8 array [H, W, 3].

    Raises:
        BadImageError: the file is empty, truncated, damaged or no picture.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if not image:
        raise BadImageError('cannot decode the image: the file is empty')
    try:
        picture = Image.open(io.BytesIO(image))
        picture.load()
        if picture.mode.startswith('I;16'):  # Pillow's own conversion of 16 bits saturates to white
            gray = np.asarray(picture).astype(np.int64)
            return Image.fromarray((gray >> 8).clip(0, 255).astype(np.uint8)).convert('RGB')
        return picture.convert('RGB')
    except Exception as e:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        reason = 'no kind of image known' if isinstance(e, UnidentifiedImageError) else one_line(e)
        raise BadImageError(f'cannot decode the image: {reason}') from e


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, bilinear with antialiasing.

    Attributes:
        size: height and width of the result, pixels.
        scale: smallest and largest share of the picture's area that is cut out.
        ratio: smallest and largest width / height of the cut.
        flip: whether to mirror every second picture.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 [size, size, 3]."""
        left, top, width, height = self._box(picture.width, picture.height, rng)
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if self.flip and rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(picture)

    def _box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draws left, top, width and height; after ten misfits, the largest centred cut that is allowed."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        w, h = width, height
        if width / height < self.ratio[0]:
            h = min(height, max(1, round(width / self.ratio[0])))
        elif width / height > self.ratio[1]:
            w = min(width, max(1, round(height * self.ratio[1])))
        return (width - w) // 2, (height - h) // 2, w, h


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """torchvision's Resize (shorter side, bilinear with antialiasing) and CenterCrop.

    Attributes:
        size: height and width of the result, pixels.
        resize: length of the shorter side before the crop, pixels; at least `size`.
    """

    size: int
    resize: int

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Returns uint8 [size, size, 3]."""
        shorter = min(picture.width, picture.height)
        width = int(self.resize * picture.width / shorter)
        height = int(self.resize * picture.height / shorter)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.asarray(picture.crop((left, top, left + self.size, top + self.size)))
