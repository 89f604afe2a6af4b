"""Images with any number of channels, and the arrays in .npy files.

Pillow's images have 8 bits and one, three or four channels. `Planes` holds one Pillow image of floating-point
values per channel, and has those methods of Pillow's images that crops and flips use.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

NPY = b'\x93NUMPY'  # the first bytes of a .npy file
_UNITS = {'uint8': 1.0, 'uint16': 255 / 65535, 'float32': 255.0}  # to values of 8 bits
_BANDS = {'L', 'LA', 'RGB', 'RGBA'}  # Pillow's modes whose bands are the channels of an image


class Planes:
    """An image [H, W, C] of float32, with values from 0 to 255 for an image of 8 bits.

    Args:
        bands: one image of Pillow's mode 'F' for each channel.

    Attributes:
        size: width and height in pixels, as Pillow's images have it.
    """

    def __init__(self, bands: Sequence[Image.Image]):
        self._bands = bands
        self.size = self.width, self.height = bands[0].size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(band) for band in self._bands], axis=-1).astype(dtype or np.float32)

    def _each(self, change: Callable[[Image.Image], Image.Image]) -> 'Planes':
        return Planes([change(band) for band in self._bands])

    def crop(self, box: tuple[int, int, int, int]) -> 'Planes':
        """Returns the pixels within (left, top, right, bottom)."""
        return self._each(lambda band: band.crop(box))

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling,
        box: tuple[float, float, float, float] | None = None,
    ) -> 'Planes':
        """Returns the image, or the part of it in the box, in another size."""
        return self._each(lambda band: band.resize(size, resample, box))

    def transpose(self, method: Image.Transpose) -> 'Planes':
        """Returns the mirrored or rotated image."""
        return self._each(lambda band: band.transpose(method))


def pixel_dtype(channels: int) -> type[np.generic]:
    """Returns the type of images in batches: uint8 for three channels, else float32 in the same units."""
    return np.uint8 if channels == 3 else np.float32


def from_array(array: np.ndarray, channels: int) -> Image.Image | Planes:
    """Returns the image of an array: a Pillow image for three channels, otherwise planes.

    Args:
        array: [H, W, channels], or [H, W] for one channel; uint8, uint16, or float32, whose usual range is
            0..1. For three channels the upper 8 bits are kept, and values outside of 0..1 are refused.
        channels: number of channels of the network.

    Raises:
        ValueError: the shape, the type or a value is wrong.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
        raise ValueError(f'the array has the shape {array.shape}, expected [H, W, {channels}]')
    if array.dtype.name not in _UNITS:
        raise ValueError(f'the array has the type {array.dtype}, expected {", ".join(_UNITS)}')
    array = array.astype(array.dtype.newbyteorder('='))
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise ValueError('the array holds values that are not finite')
    if channels != 3:
        values = array.astype(np.float32) * np.float32(_UNITS[array.dtype.name])
        return Planes([Image.fromarray(np.ascontiguousarray(values[:, :, c])) for c in range(channels)])
    if array.dtype == np.uint16:
        array = array >> 8
    if array.dtype == np.float32:
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f'the array holds values from {array.min():g} to {array.max():g}: scale to 0..1')
        array = np.rint(255 * array)
    return Image.fromarray(array.astype(np.uint8))


def from_npy(file: bytes, channels: int) -> Image.Image | Planes:
    """Returns the image of a .npy file, see `from_array`; code in the file is not run.

    Raises:
        ValueError: the file is damaged, holds objects, or the array does not fit.
    """
    return from_array(np.load(io.BytesIO(file), allow_pickle=False), channels)


def from_image(image: Image.Image, channels: int) -> Planes:
    """Returns the channels of a loaded image; for one channel its luminance, with all of 16 bits.

    Raises:
        ValueError: the image has another number of channels.
    """
    if channels == 1:
        if image.mode.startswith('I'):
            return Planes([Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(257))])
        return Planes([image.convert('L').convert('F')])
    bands = image.split() if image.mode in _BANDS else ()
    if len(bands) != channels:
        held = f'{len(image.getbands())} channels ({image.mode})'
        raise ValueError(f'the image has {held}, the network takes {channels}')
    return Planes([band.convert('F') for band in bands])
