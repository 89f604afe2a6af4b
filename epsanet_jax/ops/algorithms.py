"""Ways to compute a grouped convolution.

XLA's own lowering of a grouped convolution (`feature_group_count`) is slowest for groups of few channels with
large kernels. The pyramid of EPSANet consists of such convolutions. These techniques make them faster, alone
or combined:

    merging   Several neighbouring groups become one group with a block-diagonal kernel. This takes more
              products, but in fewer and wider matrix multiplications.
    tiling    A tile of output pixels is computed at once. The pixels of the tile become output channels, the
              kernel grows to the window that the whole tile reads, and the stride grows to the size of the
              tile. The result is a convolution with many output channels at few positions. A 9x9 kernel with
              tiles of 4x4 pixels becomes a 12x12 kernel with stride 4 and 16 times the output channels. It
              takes 1.8 times the products; merging 16 groups takes 16 times the products.
    folding   Like tiling, but the tiles of the *input* are first moved into channels (space to depth). The
              window becomes small and the stride becomes 1.
    banding   Like folding, but for columns only. Neighbouring columns are neighbours in memory, so they
              become channels without a copy. All groups are merged into one.
    phases    For stride 2 the input is split into four images, one for each combination of even or odd rows
              and columns. Each is convolved without stride with the kernel values that meet it, and the
              results are added. The gradient of the input then convolves no inserted zeros.

When several convolutions read the same input, as the branches of a pyramid do:

    joining   They become one convolution with the same number of groups. Smaller kernels are padded to the
              largest. On a matrix unit few output channels cost as much as many.

All of them equal the plain convolution up to rounding, in the output and in both gradients.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from epsanet_jax.errors import InputError, suggest
from epsanet_jax.ops import rewrites


class Algorithm(NamedTuple):
    """How to compute a grouped convolution.

    Attributes:
        name: 'stock', 'merged', 'joint' (for a single convolution the same as 'merged'), 'tiled', 'folded',
            'banded' or, for 1x1 kernels, 'matmul'.
        merge: number of neighbouring groups that are merged into one; divides the number of groups. 'banded'
            always merges all groups.
        tile: rows and columns of output pixels that are computed at once; 'banded' uses only the columns.
        split: whether each remaining group is a separate convolution, instead of one convolution with
            `feature_group_count`.
        phases: for 'merged' and 'joint' without `split`: whether the phases of the stride are convolved
            separately.
    """

    name: str
    merge: int = 1
    tile: tuple[int, int] = (1, 1)
    split: bool = False
    phases: bool = False


NAMES = ('stock', 'merged', 'dense', 'tiled', 'folded', 'banded', 'phases', 'matmul')
MERGED_CHANNELS = 64  # a dense convolution with fewer input channels leaves vector units idle


def check_name(name: str) -> None:
    """Raises InputError if there is no algorithm of this name."""
    known = ('auto', *NAMES)
    if name not in known:
        raise InputError(
            f'unknown convolution algorithm {name!r}{suggest(name, known)}; known: {", ".join(known)}'
        )


def by_name(name: str, kernel_shape: tuple[int, ...], groups: int) -> Algorithm:
    """Returns the algorithm with a name of `NAMES`, for a kernel [k, k, C_in / groups, C_out].

    stock: one convolution with `feature_group_count = groups`; used if the named one does not apply
    merged: neighbouring groups are merged until each has `MERGED_CHANNELS` input channels
    dense: all groups are merged
    tiled, folded: groups are not merged; tiles have 4x4 pixels for large kernels, 2x2 for small ones
    banded: all groups are merged; two columns at once
    phases: groups are not merged; each phase of the stride is a separate convolution
    matmul: a matrix product, for 1x1 kernels
    """
    size, _, channels, _ = kernel_shape
    if name == 'matmul':
        return Algorithm('matmul' if size == 1 and groups == 1 else 'stock')
    if name == 'dense' and groups > 1:
        return Algorithm('merged', groups)
    if name == 'merged' and groups > 1:
        merge = next((m for m in divisors(groups) if m * channels >= MERGED_CHANNELS), groups)
        return Algorithm('merged', merge, split=True)
    if name in ('tiled', 'folded') and size > 1:
        return Algorithm(name, tile=(4, 4) if size >= 7 else (2, 2))
    if name == 'banded' and size > 1:
        return Algorithm(name, groups, (1, 2))
    if name == 'phases':
        return Algorithm('merged', phases=True)
    return Algorithm('stock')


def divisors(n: int) -> list[int]:
    """Returns the divisors of n, smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]


def convolve_all(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    stride: int,
    groups: Sequence[int],
    algorithms: Sequence[Algorithm],
) -> tuple[jax.Array, ...]:
    """Convolves the same images with several kernels; those whose algorithm is 'joint' are computed together.

    Args:
        x: images, [N, H, W, C_in].
        kernels: arrays [k, k, C_in / groups, C_out] with odd k; k, groups and C_out may differ.
        stride: step in both directions.
        groups: number of groups for each kernel.
        algorithms: algorithm for each kernel.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out] for each kernel.
    """
    # Split once for all kernels: the gradients of each phase are then added before they are interleaved.
    by_phase = rewrites.split_phases(x, stride) if any(a.phases for a in algorithms) else None
    outputs: dict[int, jax.Array] = {}
    joint: dict[tuple[int, bool], list[int]] = {}  # only equal numbers of groups can be one convolution
    for i, algorithm in enumerate(algorithms):
        if algorithm.name == 'joint':
            joint.setdefault((groups[i] // algorithm.merge, algorithm.phases), []).append(i)
        else:
            outputs[i] = _convolve(x, by_phase, kernels[i], stride, groups[i], algorithm)
    for (_, phases), members in joint.items():
        merged = [_merge(kernels[i], groups[i], algorithms[i].merge) for i in members]
        parts = _joint(x, by_phase if phases else None, merged, stride)
        outputs.update(zip(members, parts, strict=True))
    return tuple(outputs[i] for i in range(len(kernels)))


def convolve(x: jax.Array, kernel: jax.Array, stride: int, groups: int, algorithm: Algorithm) -> jax.Array:
    """Convolves images with a kernel, with `k // 2` zeros of padding on every side.

    Args:
        x: images, [N, H, W, C_in].
        kernel: [k, k, C_in / groups, C_out] with odd k.
        stride: step in both directions.
        groups: number of groups.
        algorithm: how to compute it; changes the result by rounding only.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out].
    """
    return convolve_all(x, (kernel,), stride, (groups,), (algorithm,))[0]


def _convolve(x, by_phase, kernel, stride, groups, algorithm):
    if algorithm.name == 'matmul':
        return rewrites.matmul(x, kernel, stride)
    if algorithm.name == 'stock':
        return rewrites.stock(x, kernel, stride, groups)
    if algorithm.name == 'banded':
        kernel = _merge(kernel, groups, groups)[:, :, :, 0]
        return rewrites.banded(x, kernel, stride, algorithm.tile[1])
    kernels = _merge(kernel, groups, algorithm.merge)  # [k, k, I, B, O]
    if algorithm.phases:
        return rewrites.phases(by_phase, kernels, stride)
    if algorithm.name == 'merged':
        return rewrites.merged(x, kernels, stride, algorithm.split)
    fold = algorithm.name == 'folded'
    return rewrites.tiled(x, kernels, stride, algorithm.tile, algorithm.split, fold)


def _joint(x, by_phase, kernels, stride):
    """Convolves with several kernels [k, k, I, B, O], whose k and O may differ, in one convolution."""
    size = max(k.shape[0] for k in kernels)
    blocks, widths = kernels[0].shape[3], [k.shape[4] for k in kernels]
    margins = [(size - k.shape[0]) // 2 for k in kernels]
    padded = [
        rewrites.pad(k, ((m, m), (m, m), *(((0, 0),) * 3))) for k, m in zip(kernels, margins, strict=True)
    ]
    kernel = jnp.concatenate(padded, axis=4)
    if by_phase is not None:
        y = rewrites.phases(by_phase, kernel, stride)
    else:
        y = rewrites.merged(x, kernel, stride, split=False)
    y = y.reshape(*y.shape[:3], blocks, sum(widths))
    parts = jnp.split(y, list(itertools.accumulate(widths))[:-1], axis=4)
    return [part.reshape(*y.shape[:3], blocks * width) for part, width in zip(parts, widths, strict=True)]


def _merge(kernel: jax.Array, groups: int, merge: int) -> jax.Array:
    """Turns [k, k, I, C_out] into block-diagonal [k, k, merge * I, B, C_out / B]; B is groups / merge."""
    kh, kw, inputs, outputs = kernel.shape
    each = outputs // groups
    if merge == 1:
        return kernel.reshape(kh, kw, inputs, groups, each)
    # `where` instead of a product with 0: an infinite weight must not put NaN into other groups.
    zero = jnp.zeros((), kernel.dtype)
    if merge == groups:  # here the form below makes weight gradients four times as slow on a TPU
        k = kernel.reshape(kh, kw, inputs, groups, 1, each).transpose(0, 1, 3, 2, 4, 5)
        same_group = jnp.eye(groups, dtype=bool)[:, None, :, None]  # [groups, 1, groups, 1]
        return jnp.where(same_group, k, zero).reshape(kh, kw, groups * inputs, 1, outputs)
    member = np.arange(outputs) // each % merge  # [C_out]: place of the output's group in its merged group
    k = jnp.concatenate([jnp.where(member == i, kernel, zero) for i in range(merge)], axis=2)
    return k.reshape(kh, kw, merge * inputs, groups // merge, merge * each)
