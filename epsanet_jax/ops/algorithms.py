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

    direct    Multiply-adds of shifted images instead of matrix products, see `direct`.
    pallas    Kernels of our own for TPUs, see `pallas_tpu`.

When several convolutions read the same input, as the branches of a pyramid do:

    joining   They become one convolution with the same number of groups. Smaller kernels are padded to the
              largest. On a matrix unit few output channels cost as much as many.

All of them equal the plain convolution up to rounding, in the output and in both gradients.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.errors import InputError, suggest
from epsanet_jax.ops import direct, pallas_tpu, rewrites
from epsanet_jax.ops.plain import Window, divisors, pad


class Algorithm(NamedTuple):
    """How to compute a grouped convolution.

    Attributes:
        name: 'stock', 'merged', 'joint' (for a single convolution the same as 'merged'), 'tiled', 'folded',
            'banded', 'by_channel', 'by_image', 'pallas' or, for 1x1 kernels, 'matmul'.
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


DIRECT = ('by_channel', 'by_image')  # multiply-adds of shifted images, see `direct`
NAMES = ('stock', 'merged', 'dense', 'tiled', 'folded', 'banded', 'phases', 'matmul', *DIRECT, 'pallas')
MERGED_CHANNELS = 64  # a dense convolution with fewer input channels leaves vector units idle


def check_name(name: str) -> None:
    """Raises InputError if there is no algorithm of this name."""
    known = ('auto', *NAMES)
    if name not in known:
        raise InputError(
            f'unknown convolution algorithm {name!r}{suggest(name, known)}; known: {", ".join(known)}'
        )


def by_name(name: str, kernel_shape: tuple[int, ...], groups: int) -> Algorithm:
    """Returns the algorithm with a name of `NAMES`, for a kernel [kh, kw, C_in / groups, C_out].

    stock: one convolution with `feature_group_count = groups`; used if the named one does not apply
    merged: neighbouring groups are merged until each has `MERGED_CHANNELS` input channels
    dense: all groups are merged
    tiled, folded: groups are not merged; tiles have 4x4 pixels for large kernels, 2x2 for small ones
    banded: all groups are merged; two columns at once
    phases: groups are not merged; each phase of the stride is a separate convolution
    matmul: a matrix product for each group, for 1x1 kernels
    by_channel, by_image: multiply-adds of shifted images, for few of them (`direct.has_few_terms`)
    pallas: none of its own; `bilinear` takes those of 'auto' and, where one applies, of `pallas_tpu`
    """
    rows, columns, channels, outputs = kernel_shape
    size = max(rows, columns)
    if name in DIRECT:
        few = direct.has_few_terms(rows * columns, channels * groups, outputs, groups)
        return Algorithm(name if few else 'stock')
    if name == 'matmul':
        return Algorithm('matmul' if size == 1 else 'stock')
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


def convolve_all(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    windows: Sequence[Window],
    groups: Sequence[int],
    algorithms: Sequence[Algorithm],
) -> tuple[jax.Array, ...]:
    """Convolves the same images with several kernels; those whose algorithm is 'joint' are computed together.

    Args:
        x: images, [N, H, W, C_in].
        kernels: arrays [kh, kw, C_in / groups, C_out]; all but C_in may differ.
        windows: window for each kernel, all with the same strides.
        groups: number of groups for each kernel.
        algorithms: algorithm for each kernel.

    Returns:
        [N, rows, columns, C_out] for each kernel.
    """
    outputs: dict[int, jax.Array] = {}
    joint: dict[tuple[int, bool], list[int]] = {}  # only equal numbers of groups can be one convolution
    plain = all(window.dilation == (1, 1) for window in windows)
    # Split once for all kernels: the gradients of each phase are then added before they are interleaved.
    by_phase = (
        rewrites.split_phases(x, windows[0].strides) if any(a.phases for a in algorithms) and plain else None
    )
    for i, algorithm in enumerate(algorithms):
        if algorithm.name == 'joint' and plain:
            joint.setdefault((groups[i] // algorithm.merge, algorithm.phases), []).append(i)
        else:
            outputs[i] = _convolve(x, by_phase, kernels[i], windows[i], groups[i], algorithm)
    for (_, phases), members in joint.items():
        merged = [rewrites.merge_groups(kernels[i], groups[i], algorithms[i].merge) for i in members]
        parts = _joint(x, by_phase if phases else None, merged, [windows[i] for i in members])
        outputs.update(zip(members, parts, strict=True))
    return tuple(outputs[i] for i in range(len(kernels)))


def forward(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    windows: Sequence[Window],
    groups: Sequence[int],
    algorithms: Sequence[Algorithm],
    interpret: bool = False,
) -> list[jax.Array]:
    """Returns the same as `convolve_all`, whose arguments it has, also by Pallas kernels.

    With `interpret`, Pallas kernels are computed by XLA's operations, because this is no TPU.
    """
    outputs: dict[int, jax.Array] = {}
    if ours := [i for i, algorithm in enumerate(algorithms) if algorithm.name == 'pallas']:
        some = [kernels[i] for i in ours], tuple(groups[i] for i in ours), windows[ours[0]].strides[0]
        outputs.update(zip(ours, pallas_tpu.convolve(x, *some, interpret), strict=True))
    rest = [i for i in range(len(kernels)) if i not in outputs]
    if rest:
        settings = [windows[i] for i in rest], [groups[i] for i in rest], [algorithms[i] for i in rest]
        outputs.update(zip(rest, convolve_all(x, [kernels[i] for i in rest], *settings), strict=True))
    return [outputs[i] for i in range(len(kernels))]


def convolve(x: jax.Array, kernel: jax.Array, window: Window, groups: int, algorithm: Algorithm) -> jax.Array:
    """Convolves images with one kernel, as `convolve_all`; returns [N, rows, columns, C_out]."""
    return convolve_all(x, (kernel,), (window,), (groups,), (algorithm,))[0]


def input_gradient(
    shape: Sequence[int],
    dys: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    windows: Sequence[Window],
    groups: Sequence[int],
    algorithms: Sequence[Algorithm],
    interpret: bool = False,
) -> jax.Array:
    """Returns the gradient of the images from those of the outputs of `convolve_all`.

    Args:
        shape: shape of the images.
        dys: gradient of each output.
        kernels: as in `convolve_all`.
        windows: as in `convolve_all`.
        groups: as in `convolve_all`.
        algorithms: algorithm for each kernel.
        interpret: whether a Pallas kernel is computed by XLA's operations, because this is no TPU.
    """
    arguments = list(zip(dys, kernels, windows, groups, algorithms, strict=True))
    terms = [
        direct.input_gradient(dy, k, window, g, shape[1:3], a.name == 'by_image')
        for dy, k, window, g, a in arguments
        if a.name in DIRECT
    ]
    if ours := [argument for argument in arguments if argument[4].name == 'pallas']:
        ds, ks, ws, gs, _ = zip(*ours, strict=True)
        terms.append(pallas_tpu.input_gradient(tuple(shape), ds, ks, gs, ws[0].strides[0], interpret))
    if others := [argument for argument in arguments if argument[4].name not in (*DIRECT, 'pallas')]:
        dys, *rest = zip(*others, strict=True)
        terms += jax.linear_transpose(lambda x: convolve_all(x, *rest), _like(dys[0], shape))(dys)
    return sum(terms[1:], terms[0])


def weight_gradient(
    x: jax.Array,
    dys: Sequence[jax.Array],
    shapes: Sequence[tuple[int, ...]],
    windows: Sequence[Window],
    groups: Sequence[int],
    algorithms: Sequence[Algorithm],
    interpret: bool = False,
) -> list[jax.Array]:
    """Returns the gradients of the kernels, of these shapes, from those of the outputs of `convolve_all`.

    Args:
        x: images, [N, H, W, C_in].
        dys: gradient of each output.
        shapes: shape of each kernel.
        windows: as in `convolve_all`.
        groups: as in `convolve_all`.
        algorithms: algorithm for each kernel.
        interpret: whether Pallas kernels are computed by XLA's operations, because this is no TPU.
    """
    gradients: dict[int, jax.Array] = {}
    for i, algorithm in enumerate(algorithms):
        if algorithm.name in DIRECT:
            by_image = algorithm.name == 'by_image'
            gradients[i] = direct.weight_gradient(x, dys[i], windows[i], groups[i], shapes[i][:2], by_image)
    if ours := [i for i, algorithm in enumerate(algorithms) if algorithm.name == 'pallas']:
        parts, sizes = tuple(groups[i] for i in ours), tuple(shapes[i][0] for i in ours)
        settings = parts, sizes, windows[ours[0]].strides[0]
        found = pallas_tpu.weight_gradients(x, [dys[i] for i in ours], *settings, interpret)
        gradients.update(zip(ours, found, strict=True))
    rest = [i for i in range(len(shapes)) if i not in gradients]
    if rest:
        kernels = [_like(x, shapes[i]) for i in rest]
        settings = [windows[i] for i in rest], [groups[i] for i in rest], [algorithms[i] for i in rest]
        pull = jax.linear_transpose(lambda kernels: convolve_all(x, kernels, *settings), kernels)
        gradients.update(zip(rest, pull(tuple(dys[i] for i in rest))[0], strict=True))
    return [gradients[i] for i in range(len(shapes))]


def _like(a: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns zeros that vary over the same mesh axes as `a`; JAX sums other gradients over the devices."""
    return lax.full_like(a, 0, shape=tuple(shape))


def _convolve(x, by_phase, kernel, window, groups, algorithm):
    if algorithm.name == 'matmul':
        return rewrites.matmul(x, kernel, window, groups)
    if algorithm.name == 'stock':
        return rewrites.stock(x, kernel, window, groups)
    if algorithm.name in DIRECT:
        return direct.forward(x, kernel, window, groups, algorithm.name == 'by_image')
    kernels = rewrites.merge_groups(kernel, groups, algorithm.merge)  # [kh, kw, I, B, O]
    if algorithm.name == 'merged' and not algorithm.phases:
        return rewrites.merged(x, kernels, window, algorithm.split)
    if window.dilation != (1, 1):
        again = functools.partial(convolve, kernel=kernel, groups=groups, algorithm=algorithm)
        return rewrites.without_dilation(x, kernel, window, lambda x, window: again(x, window=window))
    if algorithm.name == 'banded':
        kernel = rewrites.merge_groups(kernel, groups, groups)[:, :, :, 0]
        return rewrites.banded(x, kernel, window, algorithm.tile[1])
    if algorithm.phases:
        by_phase = rewrites.split_phases(x, window.strides) if by_phase is None else by_phase
        return rewrites.phases(by_phase, kernels, window, window.outputs(x.shape[1:3], kernel.shape))
    if algorithm.name == 'joint':
        return rewrites.merged(x, kernels, window, split=False)
    return rewrites.tiled(x, kernels, window, algorithm.tile, algorithm.split, algorithm.name == 'folded')


def _joint(x, by_phase, kernels, windows):
    """Convolves with several kernels [kh, kw, I, B, O], which differ in size and O, in one convolution."""
    blocks, widths = kernels[0].shape[3], [k.shape[4] for k in kernels]
    strides, out = windows[0].strides, windows[0].outputs(x.shape[1:3], kernels[0].shape)
    # Kernels get zeros before their first value where others begin earlier, and then up to the same size.
    lows = [max(w.padding[axis][0] for w in windows) for axis in (0, 1)]
    before = [[lows[axis] - w.padding[axis][0] for axis in (0, 1)] for w in windows]
    each = list(zip(kernels, before, strict=True))
    size = [max(k.shape[axis] + b[axis] for k, b in each) for axis in (0, 1)]
    padded = [
        pad(k, (*((b[i], size[i] - k.shape[i] - b[i]) for i in (0, 1)), *(((0, 0),) * 3))) for k, b in each
    ]
    kernel = jnp.concatenate(padded, axis=4)
    rows, columns = (
        (low, (o - 1) * stride + k - low - n)
        for low, o, stride, k, n in zip(lows, out, strides, size, x.shape[1:3], strict=True)
    )
    window = Window(strides, (rows, columns))
    if by_phase is not None:
        y = rewrites.phases(by_phase, kernel, window, out)
    else:
        y = rewrites.merged(x, kernel, window, split=False)
    y = y.reshape(*y.shape[:3], blocks, sum(widths))
    parts = jnp.split(y, list(itertools.accumulate(widths))[:-1], axis=4)
    return [part.reshape(*y.shape[:3], blocks * width) for part, width in zip(parts, widths, strict=True)]
