"""Finds the fastest algorithm for each convolution of the networks, in each direction.

    python benchmarks/grouped_conv.py --batch 8 --dtype float32 --write --out results.jsonl
    python benchmarks/grouped_conv.py --batch 128 --dtype bfloat16 --write --kernels 9          # a GPU
    python benchmarks/grouped_conv.py --batch 128 --dtype bfloat16 --topology v5e:2x4   # needs libtpu

Times every algorithm on this machine's device. With --topology it takes the TPU compiler's cost estimate
instead, with --batch images per chip. With --write the fastest algorithms replace those of the same
convolution in epsanet_jax/ops/choices.json, the table that conv='auto' reads.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import flax.linen as nn
import jax
import jax.numpy as jnp

from epsanet_jax.analysis import hlo
from epsanet_jax.models import create_model
from epsanet_jax.models.conv import Conv
from epsanet_jax.ops import algorithms, choice
from epsanet_jax.ops.algorithms import DIRECT, Algorithm, by_name, convolve
from epsanet_jax.ops.choice import DIRECTIONS, MOST_SPLIT, Problem
from epsanet_jax.ops.plain import Window, divisors
from epsanet_jax.ops.rewrites import bands

TILES = ((1, 2), (2, 2), (1, 4), (2, 4), (4, 4), (2, 8))
TABLE = Path(choice.__file__).with_name(choice.TABLE)


def main() -> None:
    """Measures, prints, and with --write updates the table."""
    args = _parse()
    target = common.tpu_devices(args.topology)[0] if args.topology else None
    device = {'platform': 'tpu', 'device': args.topology} if args.topology else common.describe_device()
    wanted = [p for m in args.models for p in problems(m, args.batch, args.dtype, args.image_size)]
    wanted = [p for p in dict.fromkeys(wanted) if not args.kernels or p.kernel in args.kernels]
    start = time.perf_counter()
    for i, problem in enumerate(wanted):
        spent = time.perf_counter() - start
        left = f', {spent / i * (len(wanted) - i) / 60:.0f} min left' if i else ''
        common.log(f'{i + 1} of {len(wanted)}{left}: {problem}')
        best = {}
        for direction in DIRECTIONS:
            costs = measure(problem, direction, device['platform'], target, args.limit)
            for algorithm, cost in costs.items():
                record = {
                    **problem._asdict(),
                    'direction': direction,
                    'algorithm': algorithm._asdict(),
                    **cost,
                }
                common.emit({'benchmark': 'grouped_conv', **device, **record}, args.out)
            best[direction] = min(costs, key=lambda a: next(iter(costs[a].values())))
        if args.write:
            write(device['platform'] if args.topology else table_key(jax.devices()[0]), problem, best)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['epsanet50_small', 'epsanet50_large'])
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--kernels', type=int, nargs='*', help='only these kernel sizes')
    parser.add_argument('--topology', help="such as v5e:2x4: the TPU compiler's cost instead of time")
    parser.add_argument(
        '--limit', type=float, default=6, help='skip algorithms with more than LIMIT times the products'
    )
    parser.add_argument('--write', action='store_true', help="update the package's table")
    parser.add_argument('--out', type=Path, help='append the lines to this file')
    return parser.parse_args()


def problems(name: str, batch: int, dtype: str, image_size: int) -> list[Problem]:
    """Returns the distinct convolutions of a network, without those on 1x1 images, which take no time."""
    found = {}

    def note(call, args, kwargs, context):
        module = context.module
        if isinstance(module, Conv) and context.method_name == '__call__' and args[0].shape[2] > 1:
            n, size, _, channels = args[0].shape
            shape = (module.kernel_size, module.stride, module.groups, channels, module.features)
            found[Problem(*shape, size, n, dtype)] = True
        return call(*args, **kwargs)

    model = create_model(name, dtype=jnp.dtype(dtype))
    images = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), dtype)
    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), images)
    return list(found)


def candidates(problem: Problem, platform: str, limit: float) -> Iterator[Algorithm]:
    """Yields the algorithms to measure: those with at most about `limit` times the products."""
    yield Algorithm('stock')
    if problem.kernel == 1 and problem.groups <= MOST_SPLIT:
        yield Algorithm('matmul')
        if problem.groups == 1:
            return
    split = platform == 'cpu'  # XLA has no fast path for groups there
    if split and problem.groups > 1:
        shape = (problem.kernel, problem.kernel, problem.channels // problem.groups, problem.features)
        yield from (a for a in (by_name(name, shape, problem.groups) for name in DIRECT) if a.name in DIRECT)
    for merge in divisors(problem.groups):
        if problem.groups > 1 and (merge <= 2 * limit or merge == problem.groups):
            yield Algorithm('merged', merge, split=split)
        if problem.stride > 1 and not split and merge <= 2 * limit:
            yield Algorithm('merged', merge, phases=True)
        if problem.groups == 1 and problem.channels > 3:
            continue  # one dense convolution is already wide enough
        for tile in TILES:
            window = math.prod((t - 1) * problem.stride + problem.kernel for t in tile)
            if merge * window / problem.kernel**2 <= limit and tile[1] <= problem.size // problem.stride:
                yield Algorithm('tiled', merge, tile, split)
                if platform != 'tpu':  # padding the folded images is too expensive there
                    yield Algorithm('folded', merge, tile, split)
    for columns in (2, 4):
        window = (
            (1 + sum(bands(problem.kernel, problem.stride, problem.kernel // 2, columns)))
            * columns
            * problem.stride
        )
        products = problem.groups * window / problem.kernel
        if products <= 2 * limit and columns <= problem.size // problem.stride:
            yield Algorithm('banded', problem.groups, (1, columns))


def measure(problem: Problem, direction: str, platform: str, target: Any, limit: float) -> dict:
    """Returns the cost of each algorithm that compiles: {'ms': ..} or {'cycles': .., 'bytes': .., ..}."""
    costs: dict[Algorithm, dict[str, float]] = {}
    for algorithm in candidates(problem, platform, limit):
        if platform == 'cpu' and algorithm.name == 'stock' and problem.groups > 1 and direction != 'forward':
            continue  # takes seconds
        function, shapes = direction_of(problem, algorithm, direction)
        try:
            if target is not None:
                costs[algorithm] = tpu_cost(function, shapes, target)
            else:
                arrays = [
                    jax.random.normal(jax.random.key(i), s.shape, s.dtype) for i, s in enumerate(shapes)
                ]
                compiled = jax.jit(function).lower(*arrays).compile()
                took = common.seconds(lambda c=compiled, a=arrays: c(*a), jax.block_until_ready)
                costs[algorithm] = {'ms': round(1e3 * took, 3)}
        except jax.errors.JaxRuntimeError as e:
            common.log(f'skipped {algorithm}: {" ".join(str(e).split())[:200]}')
    return costs


def direction_of(problem: Problem, algorithm: Algorithm, direction: str):
    """Returns the function that computes one direction, and the shapes of its two arguments."""
    p = problem
    x = jax.ShapeDtypeStruct((p.batch, p.size, p.size, p.channels), p.dtype)
    kernel = jax.ShapeDtypeStruct((p.kernel, p.kernel, p.channels // p.groups, p.features), p.dtype)
    window = Window((p.stride, p.stride), ((p.kernel // 2,) * 2,) * 2)
    settings = (window,), (p.groups,), (algorithm,)

    def forward(x, kernel):
        return convolve(x, kernel, window, p.groups, algorithm)

    def input_gradient(kernel, dy):
        return algorithms.input_gradient(x.shape, (dy,), (kernel,), *settings)

    def weight_gradient(x, dy):
        return algorithms.weight_gradient(x, (dy,), (kernel.shape,), *settings)[0]

    y = jax.eval_shape(forward, x, kernel)
    return {
        'forward': (forward, (x, kernel)),
        'input_gradient': (input_gradient, (kernel, y)),
        'weight_gradient': (weight_gradient, (x, y)),
    }[direction]


def tpu_cost(function, shapes, device) -> dict[str, float]:
    """Returns the TPU compiler's cost estimate of a function on one chip."""
    place = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place) for s in shapes]
    start = time.perf_counter()
    compiled = jax.jit(function).trace(*args).lower(lowering_platforms=('tpu',)).compile()
    found = hlo.analyze(compiled.as_text())
    return {
        'cycles': found['cycles'],
        'bytes': compiled.cost_analysis()['bytes accessed'],
        'compile_s': round(time.perf_counter() - start, 1),
    }


def table_key(device: jax.Device) -> str:
    """Returns the name under which the table and `lax.platform_dependent` know a device's platform."""
    if device.platform != 'gpu':
        return device.platform
    return 'rocm' if 'rocm' in device.client.platform_version.lower() else 'cuda'


def write(platform: str, problem: Problem, best: dict[str, Algorithm], path: Path | None = None) -> None:
    """Replaces this convolution's row of the table, by default of the package's."""
    path = path or TABLE
    table = json.loads(path.read_text()) if path.exists() else {}
    rows = {tuple(row[f] for f in Problem._fields): row for row in table.get(platform, [])}
    rows[tuple(problem)] = {**problem._asdict(), **{d: shorten(best[d]) for d in DIRECTIONS}}
    table[platform] = [rows[key] for key in sorted(rows)]
    lines = (
        f' {json.dumps(name)}: [\n' + ',\n'.join('  ' + json.dumps(row) for row in rows) + '\n ]'
        for name, rows in sorted(table.items())
    )
    path.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


def shorten(algorithm: Algorithm) -> dict[str, Any]:
    """Returns the fields of an algorithm that differ from the default."""
    default = Algorithm('')
    fields = algorithm._asdict().items()
    return {k: v for k, v in fields if v != getattr(default, k)}


if __name__ == '__main__':
    main()
