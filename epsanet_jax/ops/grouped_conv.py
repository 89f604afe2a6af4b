"""Grouped 2-D convolutions whose algorithm is chosen for the target platform at compile time.

The forward pass, the input gradient and the weight gradient each have their own algorithm (`algorithms`). It
is chosen by platform, shape, batch and dtype (`choice`). `bilinear` makes the three directions primitives of
JAX.
"""

import numbers
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from epsanet_jax.errors import InputError
from epsanet_jax.ops import algorithms, bilinear
from epsanet_jax.ops.plain import Window
from epsanet_jax.ops.rewrites import stock

Pair = int | Sequence[int]
Padding = Literal['SAME', 'VALID'] | int | Sequence[int | tuple[int, int]] | None


def grouped_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: Pair = 1,
    groups: int = 1,
    dilation: Pair = 1,
    padding: Padding = None,
    algorithm: str = 'auto',
) -> jax.Array:
    """Convolves images with a kernel whose input channels are split into groups.

    Args:
        x: images, [N, H, W, C_in], floating point.
        kernel: [kh, kw, C_in / groups, C_out], of the same dtype as `x`; output channel j reads the input
            channels of group `j // (C_out / groups)`.
        stride: pixels between two outputs, or a pair for rows and columns.
        groups: number of groups; divides C_in and C_out.
        dilation: pixels between neighbouring values of the kernel, or a pair.
        padding: zeros around the images: a number for all sides; a number or a pair (before, after) for the
            rows and one for the columns; 'SAME' or 'VALID' as in XLA. By default `dilation * (k // 2)` on
            both sides, as PyTorch's `padding=k // 2`; with strides this differs from 'SAME'.
        algorithm: 'auto', or one of `algorithms.NAMES` for all directions (`algorithms.by_name`).

    Returns:
        [N, rows, columns, C_out] with the dtype of `x`; by default, and for an odd kernel,
        [N, ceil(H / stride), ceil(W / stride), C_out].

    Raises:
        InputError: the shapes or dtypes do not fit together, the stride, the dilation or the padding is not
            valid, or the algorithm is unknown.
    """
    kwargs = {'stride': stride, 'dilation': dilation, 'padding': padding, 'algorithm': algorithm}
    return pyramid_conv(x, (kernel,), groups=(groups,), **kwargs)[0]


def pyramid_conv(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    *,
    groups: Sequence[int],
    stride: Pair = 1,
    dilation: Pair = 1,
    padding: Padding = None,
    algorithm: str = 'auto',
) -> tuple[jax.Array, ...]:
    """Convolves the same images with several kernels.

    The results equal those of `grouped_conv` with each kernel. Computing them together can be faster.

    Args:
        x: images, [N, H, W, C_in], floating point.
        kernels: arrays [kh, kw, C_in / groups, C_out]; all but C_in may differ.
        groups: number of groups for each kernel.
        stride: as in `grouped_conv`, for all kernels.
        dilation: as in `grouped_conv`, for all kernels.
        padding: as in `grouped_conv`, for all kernels.
        algorithm: as in `grouped_conv`.

    Returns:
        [N, rows, columns, C_out] for each kernel.

    Raises:
        InputError: as `grouped_conv`, or there are not as many groups as kernels.
    """
    if len(kernels) != len(groups):
        raise InputError(f'pyramid_conv: {len(kernels)} kernels need as many groups, got {len(groups)}')
    algorithms.check_name(algorithm)
    x, kernels = jnp.asarray(x), tuple(jnp.asarray(kernel) for kernel in kernels)
    for kernel, g in zip(kernels, groups, strict=True):
        _check(x, kernel, g)
    if not kernels:
        return ()
    strides, dilations = _pair('stride', stride), _pair('dilation', dilation)
    windows = tuple(_window(x, kernel, strides, dilations, padding) for kernel in kernels)
    spec = bilinear.Spec(windows, tuple(int(g) for g in groups), algorithm)
    if any(
        isinstance(n, int) and n < 1
        for k, w in zip(kernels, windows, strict=True)
        for n in (*x.shape, *w.outputs(x.shape[1:3], k.shape))
    ):
        return _stock(x, kernels, spec)
    return _on_mesh(x, kernels, spec)


def _stock(x: jax.Array, kernels: tuple[jax.Array, ...], spec: bilinear.Spec) -> tuple[jax.Array, ...]:
    each = zip(kernels, spec.windows, spec.groups, strict=True)
    return tuple(stock(x, kernel, window, g) for kernel, window, g in each)


def _on_mesh(x: jax.Array, kernels: tuple[jax.Array, ...], spec: bilinear.Spec) -> tuple[jax.Array, ...]:
    """Convolves; each device its own images, where the mesh of x has axes of type Explicit."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return _local(x, kernels, spec)
    placed = [sharding.spec[1:], *(jax.typeof(kernel).sharding.spec for kernel in kernels)]
    if any(axes is not None for spec_of in placed for axes in spec_of):
        # Rows, columns, channels or kernels on several devices: what XLA does with them, or its error.
        return _stock(x, kernels, spec)
    names, kinds = sharding.mesh.axis_names, sharding.mesh.axis_types
    explicit = {name for name, kind in zip(names, kinds, strict=True) if kind == AxisType.Explicit}
    batch = PartitionSpec(sharding.spec[0])
    local = jax.shard_map(
        lambda x, kernels: _local(x, kernels, spec),
        in_specs=(batch, PartitionSpec()),
        out_specs=batch,
        axis_names=explicit,
    )
    return local(x, kernels)


def _local(x: jax.Array, kernels: tuple[jax.Array, ...], spec: bilinear.Spec) -> tuple[jax.Array, ...]:
    if AxisType.Manual in jax.typeof(x).sharding.mesh.axis_types:
        # In a shard_map, the arguments of a primitive must vary over the same axes. Appending nothing of the
        # other arguments achieves it; the transpose sums the gradients of a kernel that all devices share.
        nothing = lax.concatenate([a[:0].reshape(0) for a in (x, *kernels)], 0)
        x, *rest = (lax.concatenate([a, nothing.reshape(0, *a.shape[1:])], 0) for a in (x, *kernels))
        kernels = tuple(rest)
    return tuple(bilinear.forward(x, kernels, spec))


def _check(x: jax.Array, kernel: jax.Array, groups: int) -> None:
    if x.ndim != 4 or kernel.ndim != 4:
        raise InputError(
            'grouped_conv: expected x [N, H, W, C] and kernel [kh, kw, C / groups, O], '
            f'got shapes {x.shape} and {kernel.shape}'
        )
    if x.dtype != kernel.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(
            'grouped_conv: x and kernel must have the same floating-point dtype, '
            f'got {x.dtype.name} and {kernel.dtype.name}'
        )
    rows, columns, inputs, outputs = kernel.shape
    if not rows or not columns:
        raise InputError(f'grouped_conv: the kernel has no values: {rows}x{columns}')
    if groups < 1 or x.shape[3] != inputs * groups or outputs % groups or not inputs or not outputs:
        raise InputError(
            f'grouped_conv: {groups} groups do not fit {x.shape[3]} input channels and a kernel of '
            f'{inputs} inputs per group and {outputs} outputs'
        )


def _integers(value: Any) -> tuple[int, int] | None:
    """Returns a pair of integers as it is and a single one twice; None for anything else."""
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, numbers.Integral) for v in pair):
        return None
    return int(pair[0]), int(pair[1])


def _pair(name: str, value: Pair) -> tuple[int, int]:
    """Returns a positive integer for rows and one for columns."""
    pair = _integers(value)
    if pair is None or min(pair) < 1:
        raise InputError(f'grouped_conv: {name} must be a positive integer or two of them, got {value!r}')
    return pair


def _window(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], dilations: tuple[int, int], padding: Padding
) -> Window:
    """Returns the window with the padding as numbers, and no dilation along an axis with a single value."""
    rows, columns = (d if size > 1 else 1 for d, size in zip(dilations, kernel.shape[:2], strict=True))
    window = Window(strides, dilation=(rows, columns))
    if padding is None:
        vertical, horizontal = (
            (d * (k // 2),) * 2 for d, k in zip(window.dilation, kernel.shape[:2], strict=True)
        )
    elif isinstance(padding, str) and padding in ('SAME', 'VALID'):
        vertical, horizontal = lax.padtype_to_pads(
            x.shape[1:3], window.extents(kernel.shape), strides, padding
        )
    else:
        each = (
            padding if isinstance(padding, Sequence) and not isinstance(padding, str) else (padding, padding)
        )
        vertical, horizontal = map(_integers, each) if len(each) == 2 else (None, None)
        if vertical is None or horizontal is None:
            raise InputError(
                "grouped_conv: padding must be 'SAME', 'VALID', an integer, or an integer or a pair for rows "
                f'and columns, got {padding!r}'
            )
    return window._replace(padding=(tuple(vertical), tuple(horizontal)))
