"""Chooses the convolution algorithms for a TPU by the cost of the whole residual block.

    python benchmarks/tpu_choices.py --model epsanet50_small --topology v5e:2x4 --layers layer2_1
    python benchmarks/tpu_choices.py --topology v5p:2x2x1 --layers layer3_1 --schedule --candidates 1

The cost of a convolution inside a block differs from its cost alone, because the compiler fuses neighbouring
operations and layouts must agree. For each convolution of a pyramid, largest kernel first, and each
direction, the script tries the algorithms that are cheapest alone. It keeps the one with which the block,
forward and backward, takes the fewest cycles. Then it tries to join convolutions: the input gradients of two
neighbours or, if all have equally many groups, all convolutions in every direction. The script rewrites the
table that conv='auto' reads (epsanet_jax/ops/choices.json). It takes 10 to 20 minutes per block on 2 cores
and needs libtpu, but no TPU. Rows for v5e are those for all TPUs, others replace them for their generation.

Cycles are the compiler's estimate or, with --schedule, the roofline of its schedules: better, but compiling a
block then takes one to several minutes.
"""

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import grouped_conv
import jax.numpy as jnp
import tpu_cost

from epsanet_jax.models import create_model
from epsanet_jax.ops import choice, generation
from epsanet_jax.ops.algorithms import Algorithm, divisors

BATCH = 128  # the number of lanes of a TPU


def main() -> None:
    """Improves the table block by block."""
    args = _parse()
    with tempfile.TemporaryDirectory() as folder:
        devices, measure = tpu_cost.begin(args.topology, folder if args.schedule else '')
        choose(args, devices[0], measure)


def choose(args: argparse.Namespace, device: Any, measure: tpu_cost.Measure) -> None:
    """Improves the rows of a device's generation, for each block that was asked for."""
    with generation.lowering_for(device.device_kind):
        rows = generation.rows_of('tpu')
    model = create_model(args.model, dtype=jnp.bfloat16)
    for layer, (block, shape) in tpu_cost.blocks(model, BATCH, args.image_size).items():
        if args.layers and layer not in args.layers:
            continue
        convolutions = [
            choice.Problem(k, block.stride, g, block.planes, block.planes // 4, shape[1], BATCH, 'bfloat16')
            for k, g in zip(block.settings.kernels, block.settings.groups, strict=True)
        ]

        def cost(block=block, shape=shape) -> int:
            choice.reload()
            record = tpu_cost.block_cost(block, shape, device, measure)
            return record['roofline_cycles_per_image' if measure.folder else 'cycles_per_image']

        where = {'benchmark': 'tpu_choices', 'model': args.model, 'topology': args.topology, 'block': layer}
        pyramid = sorted(set(convolutions))
        for problem in reversed(pyramid):
            if problem.groups > 1:
                common.emit(
                    {**where, **problem._asdict(), **improve(problem, cost, rows, device, args)}, args.out
                )
        for members, directions in together(pyramid):
            record = join(members, directions, cost, rows)
            common.emit({**where, 'joint': [p.kernel for p in members], **record}, args.out)


def improve(
    problem: choice.Problem, cost, rows: str, device: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Tries the cheapest algorithms in each direction; returns the block's cycles per image."""
    before = fewest = cost()  # with the current table
    best = choice.choose(rows, problem)
    for direction in choice.DIRECTIONS:
        alone = grouped_conv.measure(problem, direction, 'tpu', device, args.limit)
        ranked = sorted(alone, key=lambda algorithm: alone[algorithm]['cycles'])[: args.candidates]
        for algorithm in ranked:
            trial = best._replace(**{direction: algorithm})
            if trial == best:
                continue
            grouped_conv.write(rows, problem, trial._asdict())
            cycles = cost()
            common.log(f'{direction} {grouped_conv.shorten(algorithm)}: {cycles} cycles, best {fewest}')
            if cycles < fewest:
                best, fewest = trial, cycles
    grouped_conv.write(rows, problem, best._asdict())
    chosen = {direction: grouped_conv.shorten(a) for direction, a in best._asdict().items()}
    return {'cycles_per_image_before': before, 'cycles_per_image': fewest, **chosen}


def together(pyramid: Sequence[choice.Problem]) -> Iterator[tuple[Sequence[choice.Problem], Sequence[str]]]:
    """Yields convolutions to try as one convolution, with the directions to try."""
    if len({problem.groups for problem in pyramid}) == 1:
        yield pyramid, ('input_gradient', 'forward', 'weight_gradient')
    else:
        for pair in itertools.pairwise(pyramid):
            yield pair, ('input_gradient',)


def join(members: Sequence[choice.Problem], directions: Sequence[str], cost, table: str) -> dict[str, Any]:
    """Tries to join convolutions, direction by direction; returns the block's cycles per image."""
    before = fewest = cost()  # with the current table
    rows = {problem: choice.choose(table, problem) for problem in members}

    def write(rows: dict[choice.Problem, choice.Choice]) -> None:
        for problem, row in rows.items():
            grouped_conv.write(table, problem, row._asdict())

    kept: dict[str, int] = {}  # direction -> number of groups of the joint convolution
    counts = divisors(math.gcd(*(problem.groups for problem in members)))
    ways = list(itertools.product(reversed(counts), (False, True) if members[0].stride > 1 else (False,)))
    for direction in directions:
        apart = rows
        for groups, phases in ways:
            joint = {p: Algorithm('joint', p.groups // groups, phases=phases) for p in members}
            trial = {problem: row._replace(**{direction: joint[problem]}) for problem, row in apart.items()}
            write(trial)
            cycles = cost()
            by_phase = ' by phase' if phases else ''
            common.log(f'{direction} joint in {groups} groups{by_phase}: {cycles} cycles, best {fewest}')
            if cycles < fewest:
                rows, fewest, kept[direction] = trial, cycles, groups
    write(rows)
    return {
        'cycles_per_image_before': before,
        'cycles_per_image': fewest,
        'groups': kept,
        'by_phase': [direction for direction in kept if getattr(rows[members[0]], direction).phases],
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--model', default='epsanet50_small')
    parser.add_argument('--topology', default='v5e:2x4')
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--layers', nargs='*', help='layer1_0, layer1_1, ..; by default all distinct blocks')
    parser.add_argument('--schedule', action='store_true', help='by the roofline, not the estimate')
    parser.add_argument('--candidates', type=int, default=3, help='algorithms tried for each direction')
    parser.add_argument(
        '--limit', type=float, default=6, help='skip algorithms with more than LIMIT times the products'
    )
    parser.add_argument('--out', type=Path, help='append the lines to this file')
    return parser.parse_args()


if __name__ == '__main__':
    main()
