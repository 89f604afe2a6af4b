"""The preprocessing of images in evaluation and use."""

import dataclasses
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
        mean: mean of each channel, for values in 0..1.
        std: standard deviation of each channel, for values in 0..1.
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
        check_pixels(self.mean, self.std, 'preprocessing')
        if not MIN_SIZE <= self.image_size <= self.resize_size <= MAX_SIZE:
            raise InputError(
                f'preprocessing.image_size must be from {MIN_SIZE} to resize_size (at most {MAX_SIZE}), got '
                f'{self.image_size} and {self.resize_size}'
            )
        return self

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


def check_pixels(mean: Sequence[float], std: Sequence[float], prefix: str) -> None:
    """Raises InputError if mean or std are invalid for pixels from 0 to 1; messages start with `prefix`."""
    if len(mean) != 3 or min(mean) < 0 or max(mean) > 1:
        raise InputError(f'{prefix}.mean must be three numbers from 0 to 1, of pixels / 255, got {mean}')
    if len(std) != 3 or min(std) <= 0 or max(std) > 1:
        raise InputError(f'{prefix}.std must be three numbers above 0, at most 1, of pixels / 255, got {std}')
