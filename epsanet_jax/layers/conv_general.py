"""A replacement for `jax.lax.conv_general_dilated` that uses `grouped_conv` where it can."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.ops import grouped_conv

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_DTYPES = [(dtype, dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)]


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Returns what `jax.lax.conv_general_dilated` returns, from `grouped_conv` if `is_supported`."""
    if not is_supported(lhs, rhs, window_strides, padding, **options):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    groups, dilation = options.get('feature_group_count', 1), options.get('rhs_dilation') or 1
    return grouped_conv(lhs, rhs, stride=window_strides, groups=groups, dilation=dilation, padding=padding)


def is_supported(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **others: Any,
) -> bool:
    """Whether `grouped_conv` computes this convolution; the arguments are those of `jax.lax`.

    It does for images [N, H, W, C] and a kernel of the same floating-point type, if the images are not
    dilated and `others`, such as a precision, are None.
    """
    return (
        (lhs.ndim, rhs.ndim, dimension_numbers) == (4, 4, _NHWC)
        and all(value is None for value in others.values())
        and tuple(lhs_dilation or (1, 1)) == (1, 1)
        and (not isinstance(padding, str) or padding in ('SAME', 'VALID'))
        and (lhs.dtype, rhs.dtype) in _DTYPES
        and 0 not in rhs.shape
        and lhs.shape[3] == rhs.shape[2] * feature_group_count
        and rhs.shape[3] % feature_group_count == 0
    )
