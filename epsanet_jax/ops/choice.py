"""The fastest algorithm for a platform and shape, from a table of measurements.

`choices.json` is written by `benchmarks/grouped_conv.py` and, for TPUs, by `benchmarks/tpu_choices.py`. A
shape that is not in the table uses the algorithms of the most similar shape in it.
"""

import functools
import json
import math
from importlib import resources
from typing import Any, NamedTuple

import jax

from epsanet_jax.ops.algorithms import Algorithm, divisors

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
DIRECTIONS = ('forward', 'input_gradient', 'weight_gradient')
TABLE = 'choices.json'
MOST_SPLIT = 32  # separate convolutions for one; more take long to compile, and none were measured


class Problem(NamedTuple):
    """A convolution of [batch, size, size, channels] with a square kernel."""

    kernel: int  # height and width of the kernel
    stride: int  # step in both directions
    groups: int  # number of groups
    channels: int  # input channels of all groups together
    features: int  # output channels of all groups together
    size: int  # height or width of the images, the larger one
    batch: int  # number of images; a symbolic size, as in an export, is ignored
    dtype: str  # name of the images' type


class Choice(NamedTuple):
    """The algorithm for each direction; a gradient is computed by the transpose of its algorithm."""

    forward: Algorithm
    input_gradient: Algorithm
    weight_gradient: Algorithm


@functools.cache
def choose(platform: str, problem: Problem) -> Choice:
    """Returns the algorithms that 'auto' uses on a platform: those of the most similar measured convolution.

    Platforms without measurements use XLA's own lowering.
    """
    rows = _table().get(platform, ())
    if not rows:
        return Choice(*(Algorithm('stock'),) * 3)
    known, choice = min(rows, key=lambda row: _distance(row[0], problem))
    return Choice(*(_fit(algorithm, known, problem) for algorithm in choice))


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
    if algorithm.name == 'matmul' and (problem.kernel, problem.groups) != (1, 1):
        return Algorithm('stock')
    merge = max(d for d in divisors(problem.groups) if d <= algorithm.merge)
    if algorithm.split:
        merge = next(d for d in divisors(problem.groups) if d >= max(merge, problem.groups / MOST_SPLIT))
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


@functools.cache
def _table() -> dict[str, list[tuple[Problem, Choice]]]:
    text = resources.files(__name__.rpartition('.')[0]).joinpath(TABLE).read_text()
    return {platform: [_row(row) for row in rows] for platform, rows in json.loads(text).items()}


def _row(row: dict[str, Any]) -> tuple[Problem, Choice]:
    problem = Problem(*(row[field] for field in Problem._fields))
    algorithms = (row[direction] for direction in DIRECTIONS)
    return problem, Choice(*(Algorithm(**{**a, 'tile': tuple(a.get('tile', (1, 1)))}) for a in algorithms))
