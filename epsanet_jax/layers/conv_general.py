"""A replacement for `jax.lax.conv_general_dilated` that uses `grouped_conv` where it can."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from epsanet_jax.ops import grouped_conv

_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
_DTYPES = [(dtype, dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)]


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Returns what `jax.lax.conv_general_dilated` returns, from `grouped_conv` if `is_supported`."""
    if not is_supported(lhs, rhs, window_strides, padding, **options):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    groups, dilation = options.get('feature_group_count', 1), (options.get('rhs_dilation') or (1,))[0]
    return grouped_conv(lhs, rhs, stride=window_strides[0], groups=groups, dilation=dilation)


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

    It does for floating-point images [N, H, W, C], a square kernel of odd size, equal strides and dilations,
    and `dilation * (k // 2)` zeros on every side, if no mesh axis is Explicit and `others` are None.
    """
    if (lhs.ndim, rhs.ndim, dimension_numbers) != (4, 4, _NHWC):
        return False
    (size, width, inputs, _), dilations = rhs.shape, tuple(rhs_dilation or (1, 1))
    if isinstance(padding, str):
        window = [dilation * (k - 1) + 1 for dilation, k in zip(dilations, rhs.shape[:2], strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:3], window, window_strides, padding)
    return (
        all(value is None for value in others.values())
        and tuple(lhs_dilation or (1, 1)) == (1, 1)
        and (lhs.dtype, rhs.dtype) in _DTYPES
        and AxisType.Explicit not in jax.typeof(lhs).sharding.mesh.axis_types
        and 0 not in rhs.shape
        and lhs.shape[3] == inputs * feature_group_count
        and (width, size % 2) == (size, 1)
        and len(set(window_strides)) == len(set(dilations)) == 1
        and [tuple(pad) for pad in padding] == [(dilations[0] * (size // 2),) * 2] * 2
    )
