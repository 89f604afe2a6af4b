"""The ways to compute convolutions that `gpu_op.py` compares.

The algorithms of the package that may suit a GPU, and candidates that the package does not have: XLA's own
lowering of channels padded to multiples of 8, a stem of padded input channels, the kernel of `gpu_triton`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import gpu_triton
import grouped_conv
import jax

from epsanet_jax.ops import algorithms, rewrites
from epsanet_jax.ops.algorithms import Algorithm, convolve_all, divisors
from epsanet_jax.ops.choice import Problem
from epsanet_jax.ops.plain import Window, pad

WIDE = 64  # output channels that fill a matrix unit
Function = Callable[..., Any]


class Way(NamedTuple):
    """A way to compute one or several convolutions of the same images.

    Attributes:
        label: its fields in a line of JSON.
        directions: a function of each direction; the arguments are those of `gpu_op.operands`.
    """

    label: dict[str, Any]
    directions: dict[str, Function]


def ways(members: Sequence[Problem], others: bool = False) -> Iterator[Way]:
    """Yields the ways to compute convolutions: XLA's own, then the package's or the other candidates."""
    p, windows, groups = members[0], [window(p) for p in members], [p.groups for p in members]
    x, kernels = shapes(members)
    if len(members) > 1:
        blocks = min(groups)
        joint = [Algorithm('joint', g // blocks) for g in groups]
        label = {'joint': [p._asdict() for p in members], 'groups': blocks}
        yield Way(label, by_direction(lambda x, ks: convolve_all(x, ks, windows, groups, joint), x, kernels))
        return

    def alone(function: Function) -> dict[str, Function]:
        return by_direction(lambda x, ks: (function(x, ks[0]),), x, kernels)

    for algorithm in table_algorithms(p)[: 1 if others else None]:
        way = alone(lambda x, k, a=algorithm: algorithms.convolve(x, k, windows[0], p.groups, a))
        # Tiles: it convolves with zeros between the values, very slow. Folded: the same as phases, measured.
        if algorithm.name in ('tiled', 'folded'):
            way.pop('input_gradient', None)
        elif algorithm.phases:  # only this gradient has zeros to save
            way = {'input_gradient': way['input_gradient']}
        yield Way({'algorithm': grouped_conv.shorten(algorithm)}, way)
    if not others:
        return
    inputs = p.channels // p.groups
    if p.channels <= 3:
        for channels in (4, 8):
            way = alone(lambda x, k, c=channels: padded(x, k, windows[0], 1, 1, (c, 1)))
            yield Way({'candidate': f'{channels} input channels'}, way)
    elif p.groups > 1:
        for merge in {1, merged_to(p, 16)}:
            if (inputs * merge) % 8 or (p.features // p.groups * merge) % 8:
                way = alone(lambda x, k, m=merge: padded(x, k, windows[0], p.groups, m, (8, 8)))
                yield Way({'candidate': f'merged by {merge}, channels padded to a multiple of 8'}, way)
    if gpu_triton.fits(p.kernel, p.stride, p.groups, p.channels, p.features):
        interpret = jax.devices()[0].platform == 'cpu'
        kernel = {
            'forward': lambda x, ks: (gpu_triton.convolve(x, ks[0], p.groups, interpret),),
            'input_gradient': lambda ks, dys: gpu_triton.input_gradient(ks[0], dys[0], p.groups, interpret),
        }
        yield Way({'candidate': 'Triton kernel'}, kernel)


def window(p: Problem) -> Window:
    """Returns the window of a convolution with k // 2 zeros around the images."""
    return Window((p.stride, p.stride), ((p.kernel // 2,) * 2,) * 2)


def merged_to(p: Problem, width: int) -> int:
    """Returns how many groups to merge for at least `width` input channels."""
    return next((m for m in divisors(p.groups) if m * p.channels // p.groups >= width), p.groups)


def table_algorithms(p: Problem) -> list[Algorithm]:
    """Returns the algorithms of the package to measure, XLA's own first.

    Few, because cuDNN takes 0.4 s to choose how to compute a convolution: all groups merged; as many columns
    as fill a matrix unit; tiles of 2x2 pixels, which give the groups of a pyramid as many output as input
    channels, and groups merged to WIDE channels where they have as many; with a stride its phases apart, or
    as channels where there are no groups (never the fastest with groups).
    """
    found = [Algorithm('stock')]
    if p.kernel == 1:
        return [*found, Algorithm('matmul')]
    if p.groups > 1:
        found += [Algorithm('merged', p.groups), Algorithm('tiled', 1, (2, 2))]
    if p.groups > 1 and p.features >= p.channels:
        merges = {width * p.groups // p.channels for width in (WIDE // 2, WIDE)}
        found += [Algorithm('merged', merge) for merge in sorted(merges) if 1 < merge < p.groups]
    if p.stride > 1 and p.groups == 1:
        found.append(Algorithm('folded'))
    if p.stride > 1 and p.groups > 1:
        found.append(Algorithm('merged', p.groups, phases=True))
    wide = (WIDE // p.features, 2 * WIDE // p.features)
    wide = [n for n in wide if 1 < n <= min(4, p.size // p.stride // 4)]
    return found + [Algorithm('banded', p.groups, (1, n)) for n in wide[: 2 // p.stride]]


def padded(
    x: jax.Array, kernel: jax.Array, window: Window, groups: int, merge: int, multiples: tuple[int, int]
) -> jax.Array:
    """Convolves with merged groups whose inputs and outputs are padded to multiples of these numbers."""
    kernels = rewrites.merge_groups(kernel, groups, merge)  # [kh, kw, I, B, O]
    inputs, blocks, outputs = kernels.shape[2:]
    more, extra = -inputs % multiples[0], -outputs % multiples[1]
    kernels = pad(kernels, ((0, 0), (0, 0), (0, more), (0, 0), (0, extra)))
    x = pad(x.reshape(*x.shape[:3], blocks, inputs), (*((0, 0),) * 4, (0, more)))
    x = x.reshape(*x.shape[:3], blocks * (inputs + more))
    y = rewrites.merged(x, kernels, window, split=False)
    y = y.reshape(*y.shape[:3], blocks, outputs + extra)[..., :outputs]
    return y.reshape(*y.shape[:3], blocks * outputs)


def shapes(members: Sequence[Problem]) -> tuple[jax.ShapeDtypeStruct, tuple[jax.ShapeDtypeStruct, ...]]:
    """Returns the images' and the kernels' shapes and types."""
    p = members[0]
    x = jax.ShapeDtypeStruct((p.batch, p.size, p.size, p.channels), p.dtype)
    sizes = [(p.kernel, p.kernel, p.channels // p.groups, p.features) for p in members]
    return x, tuple(jax.ShapeDtypeStruct(size, p.dtype) for size in sizes)


def by_direction(convolve: Function, x: Any, kernels: Any) -> dict[str, Function]:
    """Returns the three directions of a function of images and several kernels of these shapes."""

    def input_gradient(kernels, dys):
        return jax.linear_transpose(lambda x: convolve(x, kernels), x)(dys)[0]

    def weight_gradient(x, dys):
        return jax.linear_transpose(lambda kernels: convolve(x, kernels), kernels)(dys)[0]

    found = {'forward': convolve, 'input_gradient': input_gradient, 'weight_gradient': weight_gradient}
    return {d: f for d, f in found.items() if d != 'input_gradient' or x.shape[3] > 3}  # not of a stem
