"""Which algorithm is the fastest: a table of measurements, looked up by platform and shape.

`choices.json` is written by `benchmarks/grouped_conv.py` and, for TPUs, `benchmarks/tpu_choices.py`. For a
shape that was not measured the nearest one that was decides.
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


class Problem(NamedTuple):
    """A convolution of [batch, size, size, channels] with a square kernel.

    Attributes:
        kernel: its height and width.
        stride: step in both directions.
        groups: number of groups.
        channels: input channels, of all groups.
        features: output channels, of all groups.
        size: height (or width) of the images.
        batch: number of images; in an export it may be a symbol, and then does not count.
        dtype: name of their type.
    """

    kernel: int
    stride: int
    groups: int
    channels: int
    features: int
    size: int
    batch: int
    dtype: str


class Choice(NamedTuple):
    """The algorithm for each direction; a gradient's is the transpose of the algorithm named."""

    forward: Algorithm
    input_gradient: Algorithm
    weight_gradient: Algorithm


@functools.cache
def choose(platform: str, problem: Problem) -> Choice:
    """Returns the algorithms that 'auto' takes on a platform: those of the nearest convolution measured.

    Platforms that were not measured take XLA's own lowering.
    """
    rows = _table().get(platform, ())
    if not rows:
        return Choice(*(Algorithm('stock'),) * 3)
    known, choice = min(rows, key=lambda row: _distance(row[0], problem))
    return Choice(*(_fit(algorithm, known, problem) for algorithm in choice))


def _distance(known: Problem, problem: Problem) -> float:
    """How unlike two convolutions are, in octaves; another kind of kernel is further than any size."""

    def octaves(a: float, b: float) -> float:
        return abs(math.log2(max(a, 1) / max(b, 1)))  # there may be no images, or no pixels

    def kinds(p: Problem) -> tuple[bool, ...]:
        """Whether 1x1, which is a product of matrices; dense; 1x1 with a stride, which leaves pixels out."""
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
    """Fits an algorithm measured on `known` to another convolution."""
    if algorithm.name == 'matmul' and (problem.kernel, problem.groups) != (1, 1):
        return Algorithm('stock')
    merge = max(d for d in divisors(problem.groups) if d <= algorithm.merge)
    alike = known[:3] == problem[:3]  # kernel, stride, groups
    same = known[:5] == problem[:5]  # and channels, features
    # Joint ones were measured beside others, which may not be there; bands merge all groups there are.
    if (algorithm.name == 'joint' and not alike) or (algorithm.name == 'banded' and not same):
        return Algorithm('merged', merge) if merge > 1 else Algorithm('stock')
    return algorithm._replace(merge=merge, phases=algorithm.phases and same)


def reload() -> None:
    """Reads the table again, for benchmarks that write it."""
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
