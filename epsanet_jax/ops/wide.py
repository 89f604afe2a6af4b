"""Several images as one wide image.

XLA:CPU divides a convolution among threads by the columns and output channels of the images. Small
images with few channels are left to a single thread. Images that lie beside each other have many columns:

    N images of W columns -> N / images wide ones of images * columns; each image is followed by zeros

Two copies of the arrays are needed. They also separate the groups, which a convolution by group needs anyway.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from epsanet_jax.ops.materialize import materialize
from epsanet_jax.ops.plain import Window, pad

PRODUCTS = 200  # multiply-adds for each output; with fewer the copies cost more than they save
MANY_OUTPUTS = 128  # XLA:CPU computes as many output channels on all threads anyway


class Wide(NamedTuple):
    """How images lie beside each other."""

    images: int = 1  # of which one wide image consists
    columns: int = 0  # of each of them, with the zeros that follow

    @classmethod
    def of(
        cls,
        x: jax.Array | jax.ShapeDtypeStruct,
        products: int,
        each: Sequence[tuple[Window, Sequence[int]]],
        columns: int,
    ) -> 'Wide':
        """Returns an arrangement for convolutions of the same images, with one image if it does not pay.

        Args:
            x: images, [N, H, W, B * I].
            products: multiply-adds for each output.
            each: window of each convolution, and (kh, kw, ..) of its kernel.
            columns: of the outputs of each convolution.
        """
        n, _, width, _ = x.shape
        if products < PRODUCTS or not (isinstance(n, int) and isinstance(width, int)):
            return cls()
        gap = 0
        for window, kernel in each:
            extent, stride, (low, _) = window.extents(kernel)[1], window.strides[1], window.padding[1]
            if not 0 <= low <= extent - stride:
                return cls()
            gap = max(gap, low, (columns - 1) * stride + extent - low - width)
        images = images_of_a_device(n)
        stride = max((window.strides[1] for window, _ in each), default=1)
        return cls(images, -(-(width + gap) // stride) * stride) if images > 1 else cls()

    def window(self, window: Window, kernel: Sequence[int]) -> Window:
        """Returns the window with which a kernel gives `columns / stride` columns for each image."""
        if self.images == 1:
            return window
        rows, (low, _) = window.padding
        high = window.extents(kernel)[1] - window.strides[1] - low
        return window._replace(padding=(rows, (low, high)))

    def join(self, x: jax.Array, blocks: int) -> jax.Array:
        """Returns [B, N / images, H, images * columns, I] from [N, H, W, B * I]."""
        n, h, w, channels = x.shape
        x = pad(x, ((0, 0), (0, 0), (0, self.columns - w), (0, 0)))
        x = x.reshape(n // self.images, self.images, h, self.columns, blocks, channels // blocks)
        x = materialize(x.transpose(4, 0, 2, 1, 3, 5))
        return x.reshape(blocks, n // self.images, h, self.images * self.columns, channels // blocks)

    def separate(self, y: jax.Array, columns: int) -> jax.Array:
        """Returns [N, H, columns, B * O] from the outputs [B, N / images, H, W, O]."""
        blocks, n, h, w, channels = y.shape
        y = materialize(y).reshape(blocks, n, h, self.images, w // self.images, channels)
        y = y[:, :, :, :, :columns].transpose(1, 3, 2, 4, 0, 5)
        return y.reshape(n * self.images, h, columns, blocks * channels)


def images_of_a_device(images: int) -> int:
    """Returns how many images may be joined or taken apart so that each device keeps its own."""
    return images // math.gcd(images, jax.device_count())
