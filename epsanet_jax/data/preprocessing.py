"""What images go through before the network."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from epsanet_jax.errors import InputError
from epsanet_jax.models.settings import check_types

MIN_SIZE, MAX_SIZE = 32, 8192  # of images, pixels; MAX_SIZE bounds what a file may ask for


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What images go through before the network, in evaluation and use; the defaults are the reference's.

    Attributes:
        image_size: height and width that the network sees, pixels.
        resize_size: length of the shorter side before the centre crop, pixels.
        mean: per channel, for values in 0..1.
        std: per channel, for values in 0..1.
        exif_orientation: whether images are turned as their EXIF tag says.
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
        """Returns the same for images of another size; the share that the centre crop keeps stays."""
        resize_size = round(self.resize_size * image_size / self.image_size)
        return dataclasses.replace(self, image_size=image_size, resize_size=resize_size)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def preprocessing_from_json(values: Mapping[str, Any]) -> Preprocessing:
    """Returns the preprocessing that JSON, which has lists for tuples, describes.

    Raises:
        InputError: a value is invalid.
        TypeError: there is a field of another name.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Preprocessing(**fields).check()


def check_pixels(mean: Sequence[float], std: Sequence[float], prefix: str) -> None:
    """Raises InputError unless pixels from 0 to 1 can be normalised by mean and std.

    Args:
        mean: per channel.
        std: per channel.
        prefix: put before the names in the message.
    """
    if len(mean) != 3 or min(mean) < 0 or max(mean) > 1:
        raise InputError(f'{prefix}.mean must be three numbers from 0 to 1, of pixels / 255, got {mean}')
    if len(std) != 3 or min(std) <= 0 or max(std) > 1:
        raise InputError(f'{prefix}.std must be three numbers above 0, at most 1, of pixels / 255, got {std}')
