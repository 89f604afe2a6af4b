"""The preprocessing of images in evaluation and use."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from epsanet_jax.errors import InputError
from epsanet_jax.models.settings import check_types

MIN_SIZE, MAX_SIZE = 32, 8192  # of images in pixels; larger values from a file are refused


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for the network in evaluation and use; the defaults are the reference's.

    Attributes:
        image_size: height and width of the network's input in pixels.
        resize_size: length of the shorter side before the centre crop in pixels.
        mean: mean of each channel, for values of 8 or 16 bits in 0..1, and other values as they are.
        std: standard deviation of each channel, in the same units.
        exif_orientation: whether to rotate images by their EXIF tag.
    """

    image_size: int = 224
    resize_size: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    exif_orientation: bool = True

    def check(self) -> 'Preprocessing':
        """Returns itself.

        Raises:
            InputError: a value has the wrong type or is out of range.
        """
        check_types(self, 'preprocessing')
        check_pixels(self.mean, self.std, 'preprocessing', len(self.mean))
        if not MIN_SIZE <= self.image_size <= self.resize_size <= MAX_SIZE:
            raise InputError(
                f'preprocessing.image_size must be from {MIN_SIZE} to resize_size (at most {MAX_SIZE}), got '
                f'{self.image_size} and {self.resize_size}'
            )
        return self

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)

    def scaled_to(self, image_size: int) -> 'Preprocessing':
        """Returns the preprocessing for another image size; the crop keeps the same share of the image."""
        resize_size = round(self.resize_size * image_size / self.image_size)
        return dataclasses.replace(self, image_size=image_size, resize_size=resize_size)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON stores them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def preprocessing_from_json(values: Mapping[str, Any]) -> Preprocessing:
    """Returns the preprocessing from its JSON fields.

    Raises:
        InputError: a value is invalid.
        TypeError: a field is unknown.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Preprocessing(**fields).check()


def check_pixels(mean: Sequence[float], std: Sequence[float], prefix: str, channels: int) -> None:
    """Raises InputError if mean or std are invalid; messages start with `prefix`.

    The pixels of images of three channels are from 0 to 1; arrays of other numbers may have any range.
    """
    each = {1: 'one number', 3: 'three numbers'}.get(channels, f'{channels} numbers, one per channel')
    unit, (least, most) = ('', (-math.inf, math.inf)) if channels != 3 else (', of pixels / 255', (0.0, 1.0))
    if len(mean) != channels or not all(least <= m <= most for m in mean):
        raise InputError(f'{prefix}.mean must be {each}{" from 0 to 1" if unit else ""}{unit}, got {mean}')
    if len(std) != channels or not all(0 < s <= most for s in std):
        limit = ' above 0, at most 1' if unit else ' above 0'
        raise InputError(f'{prefix}.std must be {each}{limit}{unit}, got {std}')


def default_preprocessing(channels: int) -> Preprocessing:
    """Returns the reference's preprocessing; for other than three channels with the mean over colours."""
    default = Preprocessing()
    if channels == 3:
        return default
    mean, std = (round(sum(values) / 3, 3) for values in (default.mean, default.std))
    return dataclasses.replace(default, mean=(mean,) * channels, std=(std,) * channels)
