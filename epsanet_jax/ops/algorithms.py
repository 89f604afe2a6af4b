"""Ways to compute a grouped convolution.

XLA's own lowering of a grouped convolution (`feature_group_count`) is at its worst on thin groups with large
kernels, which is what the pyramid of EPSANet consists of. These things mend that, alone or together:

    merging   Neighbouring groups become one, with a block-diagonal kernel: more products, in fewer and wider
              matrix multiplications.
    tiling    A tile of output pixels is computed at once. Its pixels become output channels, the kernel grows
              to the window that the whole tile sees, and the stride to the size of the tile: a convolution
              with many output channels at few places. A 9x9 kernel and tiles of 4x4 pixels make a 12x12
              kernel with stride 4, 16 times the channels and 1.8 times the products, where merging 16 groups
              takes 16 times the products.
    folding   As tiling, with the tiles of the *input* moved into channels beforehand (space to depth), so
              that the window becomes small and the stride 1.
    banding   As folding, of columns alone: neighbouring columns are neighbours in memory already, so that
              they become channels, and outputs columns, without a copy. For all groups merged into one.
    phases    The images of every second row and column, for stride 2, are four: the kernel's values that meet
              each are convolved with it without stride, and the results added. So the gradient of the input
              has no zeros between the values that it convolves.

And where several convolutions read the same input, as the branches of a pyramid do:

    joining   They become one, with as many groups and the largest kernel, into which the others are padded:
              few output channels cost a matrix unit as much as many.

All of them equal the plain convolution up to rounding, in value and in both gradients.
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
        name: 'stock', 'merged', 'joint' (alone the same as 'merged'), 'tiled', 'folded', 'banded', or, for
            1x1 kernels, 'matmul'.
        merge: how many neighbouring groups are merged into one; divides the number of groups. 'banded'
            merges all in any case.
        tile: rows and columns of output pixels that are computed at once; 'banded' takes the columns alone.
        split: one convolution for each group that remains, instead of one with `feature_group_count`.
        phases: of 'merged' and 'joint': the phases of the stride are convolved one by one; not with split.
    """

    name: str
    merge: int = 1
    tile: tuple[int, int] = (1, 1)
    split: bool = False
    phases: bool = False


NAMES = ('stock', 'merged', 'dense', 'tiled', 'folded', 'banded', 'phases', 'matmul')
MERGED_CHANNELS = 64  # below this many input channels a dense convolution leaves vector units idle


def check_name(name: str) -> None:
    """Raises InputError if there is no algorithm of this name."""
    known = ('auto', *NAMES)
    if name not in known:
        raise InputError(
            f'unknown convolution algorithm {name!r}{suggest(name, known)}; known: {", ".join(known)}'
        )


def by_name(name: str, kernel_shape: tuple[int, ...], groups: int) -> Algorithm:
    """Returns the algorithm of a name with the parameters that its idea suggests for a shape.

    stock, and whatever does not apply: one convolution with `feature_group_count = groups`
    merged: neighbouring groups merged until each has `MERGED_CHANNELS` input channels
    dense: all groups merged
    tiled, folded: groups as they are, tiles of 4x4 pixels for the large kernels, of 2x2 for the others
    banded: all groups merged, two columns at once
    phases: groups as they are, each phase of the stride by itself
    matmul: a matrix product, for 1x1 kernels

    Args:
        name: one of `NAMES`.
        kernel_shape: [k, k, C_in / groups, C_out].
        groups: of the convolution.
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
    """Convolves the same images with each kernel as `convolve` does, in one go where that is 'joint'.

    Args:
        x: images, [N, H, W, C_in].
        kernels: [k, k, C_in / groups, C_out]; k is odd; all three may differ.
        stride: step in both directions, of all.
        groups: number of groups, for each kernel.
        algorithms: how, for each kernel.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out] for each kernel.
    """
    # Taken once, so that the gradients of each phase are added before they are interleaved.
    by_phase = rewrites.split_phases(x, stride) if any(a.phases for a in algorithms) else None
    outputs: dict[int, jax.Array] = {}
    joint: dict[tuple[int, bool], list[int]] = {}  # one convolution has one number of groups
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
    """Convolves [N, H, W, C_in] with [k, k, C_in / groups, C_out], `k // 2` zeros on every side.

    Args:
        x: images.
        kernel: k is odd.
        stride: step in both directions.
        groups: number of groups.
        algorithm: how; the result does not depend on it, but for rounding.

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
    """Convolves with each of [k, k, I, B, O], the k and the O of each its own, in one convolution."""
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
    """Turns [k, k, I, C_out] into [k, k, merge * I, B, C_out / B], block-diagonal; B is groups / merge."""
    kh, kw, inputs, outputs = kernel.shape
    each = outputs // groups
    if merge == 1:
        return kernel.reshape(kh, kw, inputs, groups, each)
    # Selections, not products: an infinite weight must not put NaN into other groups.
    zero = jnp.zeros((), kernel.dtype)
    if merge == groups:  # the form below makes weight gradients four times as dear on a TPU here
        k = kernel.reshape(kh, kw, inputs, groups, 1, each).transpose(0, 1, 3, 2, 4, 5)
        same_group = jnp.eye(groups, dtype=bool)[:, None, :, None]  # [groups, 1, groups, 1]
        return jnp.where(same_group, k, zero).reshape(kh, kw, groups * inputs, 1, outputs)
    member = np.arange(outputs) // each % merge  # which of the groups that become one an output is of
    k = jnp.concatenate([jnp.where(member == i, kernel, zero) for i in range(merge)], axis=2)
    return k.reshape(kh, kw, merge * inputs, groups // merge, merge * each)
