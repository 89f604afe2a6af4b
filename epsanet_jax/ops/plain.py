"""A convolution as XLA computes it, and how its kernel moves over the images."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Window(NamedTuple):
    """How a kernel moves over images. Each field has a value for rows and one for columns.

    Attributes:
        strides: pixels between two outputs.
        padding: rows or columns of zeros before the first and after the last of the images.
        dilation: pixels between neighbouring values of the kernel.
    """

    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)

    def extents(self, kernel: Sequence[int]) -> list[int]:
        """Returns the rows and columns that a kernel [kh, kw, ..] covers."""
        return [(size - 1) * d + 1 for size, d in zip(kernel[:2], self.dilation, strict=True)]

    def outputs(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Returns the rows and columns of the result for images of H rows and W columns."""
        each = zip(size, self.padding, self.extents(kernel), self.strides, strict=True)
        return [(n + low + high - extent + stride) // stride for n, (low, high), extent, stride in each]


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> jax.Array:
    """Returns XLA's convolution of [N, H, W, C_in] with [kh, kw, C_in / groups, C_out]."""
    # XLA:CPU has no fast path for negative padding.
    if any(isinstance(n, int) and n < 0 for sides in padding for n in sides):
        x = pad(x, ((0, 0), *((min(low, 0), min(high, 0)) for low, high in padding), (0, 0)))
        padding = [(max(low, 0), max(high, 0)) for low, high in padding]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
        rhs_dilation=dilation,
    )


def pad(x: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """Pads with zeros; negative padding crops."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in padding])


def interleave(parts: list[jax.Array], axis: int) -> jax.Array:
    """Returns the parts' elements in turn: the first of each, then the second of each."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return jnp.stack(parts, axis + 1).reshape(shape)


def divisors(n: int) -> list[int]:
    """Returns the divisors of n, smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]
