"""The fastest algorithm for a platform and shape, from a table of measurements and a rule for other shapes.

`choices.json` is written by `benchmarks/grouped_conv.py`, for TPUs by `benchmarks/tpu_choices.py` and for
GPUs by `benchmarks/gpu.py`. A shape that is near to one in the table uses its algorithms. For others a rule
estimates the time of each algorithm on a CPU; other platforms use XLA's own lowering.
"""

import functools
import json
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax

from epsanet_jax.ops.algorithms import DIRECT, Algorithm
from epsanet_jax.ops.by_group import LARGEST, MOST_PHASES
from epsanet_jax.ops.direct import has_few_terms
from epsanet_jax.ops.plain import Window, divisors
from epsanet_jax.ops.wide import MANY_OUTPUTS

GPUS = ('cuda', 'rocm')
PLATFORMS = ('cpu', *GPUS, 'tpu')
DIRECTIONS = ('forward', 'input_gradient', 'weight_gradient')
TABLE = 'choices.json'
MOST_SPLIT = 32  # matrix products for one 1x1 convolution; more take long to compile
NEAR = 5.0  # distance, in octaves, up to which the algorithms of a measured convolution are used for another
TRIVIAL = 0.3  # ms that are not worth the time to compile more than one dense convolution
HALF = ('bfloat16', 'float16')
LANES = 8  # values of a vector register


class Problem(NamedTuple):
    """A convolution of images with as many rows as columns; `of` gives the most similar one for others."""

    kernel: int  # height and width of the kernel
    stride: int  # step in both directions
    groups: int  # number of groups
    channels: int  # input channels of all groups together
    features: int  # output channels of all groups together
    size: int  # height and width of the images; 0 if symbolic, as in an export
    batch: int  # number of images; a symbolic size is ignored
    dtype: str  # name of the images' type

    @classmethod
    def of(cls, x: Any, kernel: Sequence[int], window: Window, groups: int) -> 'Problem':
        """Returns the problem for images like `x` [N, H, W, C] and a kernel of shape [kh, kw, I, O]."""
        n, h, w, channels = x.shape
        size = round(math.sqrt(h * w)) if isinstance(h, int) and isinstance(w, int) else 0
        area, stride = kernel[0] * kernel[1], max(window.strides)
        return cls(math.ceil(math.sqrt(area)), stride, groups, channels, kernel[3], size, n, x.dtype.name)


class Choice(NamedTuple):
    """The algorithm for each direction; a gradient is computed by the transpose of its algorithm."""

    forward: Algorithm
    input_gradient: Algorithm
    weight_gradient: Algorithm


@functools.cache
def choose(platform: str, problem: Problem) -> Choice:
    """Returns the algorithms that 'auto' uses on a platform, or a TPU generation such as 'tpu v5p'."""
    choice = _choose(platform, problem)
    return _with_plain(choice, problem) if platform == 'cpu' and problem.groups == 1 else choice


def _with_plain(choice: Choice, p: Problem) -> Choice:
    """Replaces XLA's own convolution without groups, and its gradients, by faster ones of `by_group`."""
    plain, values = Algorithm('merged', split=True), 0
    if p.size and isinstance(p.batch, int):
        values = p.batch * (p.size / p.stride) ** 2 * p.features
    faster = {
        'forward': p.kernel > 1 and p.features < MANY_OUTPUTS,
        'input_gradient': p.kernel > 1
        and p.stride**2 <= MOST_PHASES
        and (p.stride > 1 or p.channels < MANY_OUTPUTS),
        'weight_gradient': p.kernel > 1 and p.features >= 64 and values > LARGEST,
    }
    chosen = {d: plain for d, wins in faster.items() if wins and getattr(choice, d).name == 'stock'}
    return choice._replace(**chosen)


def _choose(platform: str, problem: Problem) -> Choice:
    rows = _rows(platform)
    if platform == 'cuda':
        # With 16 bits, products of zeros cost a matrix unit little; with 32 they cost twice as much or more.
        rows = [row for row in rows if (row[0].dtype in HALF) == (problem.dtype in HALF)]
    if rows and problem.size:
        known, choice = min(rows, key=lambda row: _distance(row[0], problem))
        product = problem.kernel * problem.groups == known.kernel * known.groups == 1
        if product or _distance(known, problem) <= NEAR:
            return Choice(*(_fit(algorithm, known, problem) for algorithm in choice))
    if platform == 'cuda' and problem.kernel == problem.stride == problem.groups == 1:
        return Choice(*(Algorithm('matmul'),) * 3)
    if platform != 'cpu' or problem.groups == 1:
        return Choice(*(Algorithm('stock'),) * 3)
    candidates = list(_candidates(problem))
    return Choice(*(_fastest(candidates, problem, direction) for direction in DIRECTIONS))


def _fastest(candidates: Sequence[Algorithm], problem: Problem, direction: str) -> Algorithm:
    """Returns the fastest candidate, or one dense convolution where that takes next to no time."""
    dense = Algorithm('merged', problem.groups, split=True)
    if problem.size and milliseconds(dense, problem, direction) <= TRIVIAL:
        return dense
    return min(candidates, key=lambda algorithm: milliseconds(algorithm, problem, direction))


def _candidates(p: Problem) -> Iterator[Algorithm]:
    """Yields the algorithms that the rule compares on a CPU, for more than one group."""
    yield Algorithm('stock')
    if p.kernel == 1 and p.groups <= MOST_SPLIT:
        yield Algorithm('matmul')
    if has_few_terms(p.kernel**2, p.channels, p.features, p.groups):
        if p.size or p.stride == 1:
            yield Algorithm('by_channel')
        if p.size:
            yield Algorithm('by_image')
    for merge in divisors(p.groups):
        yield Algorithm('merged', merge, split=True)


def milliseconds(algorithm: Algorithm, p: Problem, direction: str) -> float:
    """Returns about the time of a grouped convolution in one direction on two CPU cores.

    The constants, in nanoseconds for one product or value, are fitted to measurements of float32.
    """
    size, batch = p.size or 56, p.batch if isinstance(p.batch, int) else LANES
    pixels, inputs = batch * (size / p.stride) ** 2, p.channels / p.groups
    products = pixels * p.features * inputs * p.kernel**2
    values = batch * size**2 * p.channels + pixels * p.features  # read and written
    gradient, weight = direction != 'forward', direction == 'weight_gradient'
    if algorithm.name == 'stock':
        # XLA rewrites the gradients of few channels with zeros, or computes them one product at a time.
        each = (0.4 if p.kernel == 1 else 7) if gradient else (0.15 if inputs >= 16 else 1.3)
        time = each * products
    elif algorithm.name == 'matmul':
        time = (1 + weight) * (products / 45 + 0.5 * values)
    elif algorithm.name in DIRECT:
        by_image = algorithm.name == 'by_image'
        time = (0.2 if weight else 0.075) * products + (0.5 + 0.5 * weight) * values
        if by_image:
            time *= 1.2 * -(-batch // LANES) * LANES / max(batch, 1) * (1 if p.stride == 1 else 2)
        elif p.groups < max(p.channels, p.features):
            # Inputs are repeated; for the input gradient these are the outputs.
            time += 2.3 * batch * size**2 * p.features * inputs
    else:
        convolutions = p.groups // algorithm.merge
        narrow = max(1, 2 * LANES * convolutions / p.features)  # fewer outputs than two vectors
        unfolded = 0.5 * pixels * p.kernel**2 * p.channels + 0.5 * values
        time = (1 + weight) * (algorithm.merge * narrow * products / 45 + unfolded + 5e4 * convolutions)
    return time / 1e6


def _distance(known: Problem, problem: Problem) -> float:
    """Returns how much two convolutions differ, in octaves; the kind of kernel counts more than any size."""

    def octaves(a: float, b: float) -> float:
        return abs(math.log2(max(a, 1) / max(b, 1)))  # there may be no images, or no pixels

    def kinds(p: Problem) -> tuple[bool, ...]:
        """Returns whether it is 1x1 (a matrix product), dense, and 1x1 with a stride (which skips pixels)."""
        return p.kernel == 1, p.groups == 1, p.kernel == 1 and p.stride > 1

    return (
        100 * sum(a != b for a, b in zip(kinds(known), kinds(problem), strict=True))
        + 8 * octaves(known.kernel, problem.kernel)
        + 4 * octaves(known.stride, problem.stride)
        + 2 * octaves(known.channels / known.groups, problem.channels / problem.groups)
        + 2 * octaves(known.features / known.groups, problem.features / problem.groups)
        + octaves(known.groups, problem.groups)
        + octaves(known.size, problem.size)
        + (0.5 * octaves(known.batch, problem.batch) if isinstance(problem.batch, int) else 0.0)
        + 0.5 * (known.dtype != problem.dtype)
    )


def _fit(algorithm: Algorithm, known: Problem, problem: Problem) -> Algorithm:
    """Adapts an algorithm measured on `known` to another convolution."""
    if algorithm.name == 'matmul' and (problem.kernel != 1 or problem.groups > MOST_SPLIT):
        return Algorithm('stock')
    if algorithm.name in DIRECT:
        few = has_few_terms(problem.kernel**2, problem.channels, problem.features, problem.groups)
        return algorithm if few else Algorithm('stock')
    merge = max(d for d in divisors(problem.groups) if d <= algorithm.merge)
    similar = known[:3] == problem[:3]  # kernel, stride, groups
    same = known[:5] == problem[:5]  # and channels, features
    # 'joint' was measured together with other kernels, which may be absent; 'banded' merges all groups.
    if (algorithm.name == 'joint' and not similar) or (algorithm.name == 'banded' and not same):
        return Algorithm('merged', merge) if merge > 1 else Algorithm('stock')
    return algorithm._replace(merge=merge, phases=algorithm.phases and same)


def reload() -> None:
    """Reads the table again; for benchmarks that write it."""
    _table.cache_clear()
    choose.cache_clear()
    jax.clear_caches()


def _rows(platform: str) -> list[tuple[Problem, Choice]]:
    """Returns the rows of a platform; those of a TPU generation replace those for all TPUs (v5e's)."""
    own = dict(_table().get(platform, ()))
    rest = _table().get(platform.partition(' ')[0], ())
    return [*own.items(), *(row for row in rest if row[0] not in own)]


@functools.cache
def _table() -> dict[str, list[tuple[Problem, Choice]]]:
    text = resources.files(__name__.rpartition('.')[0]).joinpath(TABLE).read_text()
    return {platform: [_row(row) for row in rows] for platform, rows in json.loads(text).items()}


def _row(row: dict[str, Any]) -> tuple[Problem, Choice]:
    problem = Problem(*(row[field] for field in Problem._fields))
    algorithms = (row[direction] for direction in DIRECTIONS)
    return problem, Choice(*(Algorithm(**{**a, 'tile': tuple(a.get('tile', (1, 1)))}) for a in algorithms))
