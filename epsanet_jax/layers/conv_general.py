"""A replacement for `jax.lax.conv_general_dilated` that uses `grouped_conv` where it can."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from epsanet_jax.ops import grouped_conv

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Returns what `jax.lax.conv_general_dilated` returns, from `grouped_conv` if `is_supported`."""
    if not is_supported(lhs, rhs, window_strides, padding, **options):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    return grouped_conv(
        lhs,
        rhs,
        stride=window_strides[0],
        groups=options.get('feature_group_count', 1),
        dilation=(options.get('rhs_dilation') or (1,))[0],
    )


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
    """Returns whether `grouped_conv` computes this convolution.

    It does for [N, H, W, C] images of a floating-point type with a square kernel of odd size, equal strides,
    equal dilations and `dilation * (k // 2)` zeros of padding on every side, unless a mesh axis is Explicit.
    The arguments are those of `jax.lax.conv_general_dilated`; each of the `others` must be None.
    """
    if lhs.ndim != 4 or rhs.ndim != 4 or dimension_numbers != _NHWC:
        return False
    size, width, inputs, _ = rhs.shape
    dilations = tuple(rhs_dilation or (1, 1))
    if isinstance(padding, str):
        window = [dilation * (k - 1) + 1 for dilation, k in zip(dilations, rhs.shape[:2], strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
    return (
        all(value is None for value in others.values())
        and tuple(lhs_dilation or (1, 1)) == (1, 1)
        and lhs.dtype == rhs.dtype
        and lhs.dtype in _DTYPES
        and AxisType.Explicit not in jax.typeof(lhs).sharding.mesh.axis_types
        and 0 not in rhs.shape
        and lhs.shape[3] == inputs * feature_group_count
        and size == width
        and size % 2 == 1
        and len(set(window_strides)) == len(set(dilations)) == 1
        and [tuple(pad) for pad in padding] == [(dilations[0] * (size // 2),) * 2] * 2
    )
