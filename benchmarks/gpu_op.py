"""A part of `gpu.py`: every way to compute the convolutions of a network, in three directions, on one device.

    python benchmarks/gpu_op.py --network epsanet50_small --batch 256 --lines lines.jsonl
    python benchmarks/gpu_op.py --others  # PyTorch, and candidates that the package does not have

For each distinct convolution it measures XLA's own lowering ('stock') and the package's algorithms that may
suit a GPU, and after the first pyramid its convolutions together. Each time is a line of JSON. What --lines
holds is not measured again.

A compiled program computes COPIES independent convolutions, so that the time to start it and the device's
cache do not matter. 'error' is the distance from XLA's own result, relative to its norm.
"""

import argparse
import functools
import itertools
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leave GPU memory for PyTorch

import grouped_conv
import jax
import jax.numpy as jnp
import torch
from gpu_candidates import Function, Way, shapes, ways, window
from zoo_shapes import CONVS

from epsanet_jax.ops.choice import Problem

COPIES = 2
NOISE = 2**27  # random values, of which the operands are parts
NETWORKS = ('epsanet50_small', 'epsanet50_large', 'resnext50', 'rehearsal')


def main() -> None:
    """Measures what is missing."""
    args = _parse()
    device = common.describe_device()
    earlier = common.read_lines(args.lines)
    begun, done = ({line[kind] for line in earlier if kind in line} for kind in ('begun', 'finished'))
    sets = problems(args.network, args.batch, args.dtype)
    if args.others:
        sets = [members for members in sets if len(members) == 1]

    def title(members: Sequence[Problem]) -> str:
        return name(members) + (', others' if args.others else '')

    known = {key(line) for line in earlier if 'direction' in line}
    missing = []
    for members in sets:
        old = known if title(members) in done else set()
        about = {'benchmark': 'gpu_op', **(members[0]._asdict() if len(members) == 1 else {})}
        jobs = [
            (way, direction)
            for way in ways(members, args.others)
            for direction in way.directions
            if key({**about, 'direction': direction, **way.label}) not in old
        ]
        if jobs:
            missing.append((members, about, jobs))
    # What may have stopped an earlier call comes last.
    missing.sort(key=lambda entry: title(entry[0]) in begun - done)
    for i, (members, about, jobs) in enumerate(missing):
        common.log(f'{i + 1} of {len(missing)}: {title(members)}')
        common.emit({'benchmark': 'gpu_op', 'begun': title(members)}, None)
        measure(members, {**about, **device}, jobs)
        if args.others:
            in_torch(members[0], {**about, **device, 'torch': torch.__version__})
        common.emit({'benchmark': 'gpu_op', 'finished': title(members)}, None)


def key(line: dict[str, Any]) -> str:
    """Returns what identifies the convolution, direction and way of a line."""
    fields = ('direction', 'algorithm', 'candidate', 'joint', *Problem._fields)
    return json.dumps({field: line[field] for field in fields if field in line}, sort_keys=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--network', choices=NETWORKS, default=NETWORKS[0])
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--dtype', default='bfloat16')
    parser.add_argument('--others', action='store_true', help="not the package's algorithms")
    parser.add_argument('--lines', type=Path, help='lines of earlier calls; what they hold is skipped')
    return parser.parse_args()


def name(members: Sequence[Problem]) -> str:
    """Returns a name for a convolution, or for several that are computed together."""
    p = members[0]
    kernels = '+'.join(f'{p.kernel}x{p.kernel}/{p.groups}' for p in members)
    features = sum(p.features for p in members)
    return f'{kernels}-s{p.stride} {p.size}x{p.channels}-{features} n{p.batch} {p.dtype}'


def problems(network: str, batch: int, dtype: str) -> list[list[Problem]]:
    """Returns the distinct convolutions of a network; of EPSANet-50 Small also the first pyramid as a whole.

    Pyramids without a stride and with large images come first, the stem last. Matrix products differ little:
    some are measured, and for other networks none.
    """
    if network == 'rehearsal':  # a pyramid, a stem and a shortcut
        small = ((5, 1, 4, 16, 8, 6), (3, 1, 1, 16, 8, 6), (3, 2, 1, 3, 8, 8), (1, 2, 1, 8, 8, 4))
        found = [Problem(*sizes, batch, dtype) for sizes in small]
    elif network == 'resnext50':
        convs = [c for c in CONVS if c.family == 'resnext-50']
        return [
            [Problem(c.kernel, c.stride, c.groups, c.inputs, c.outputs, c.size, batch, dtype)] for c in convs
        ]
    else:
        found = grouped_conv.problems(network, batch, dtype, 224)
    products = [[p] for p in found if p.kernel == 1]
    stems = [[p] for p in found if p.channels <= 3]
    spatial = [p for p in found if p.kernel > 1 and p.channels > 3]
    spatial.sort(key=lambda p: (p.stride, -p.size, -p.channels, -p.kernel))
    if network == 'epsanet50_large':
        return [[p] for p in spatial]
    pyramids = [list(same) for _, same in itertools.groupby(spatial, key=lambda p: p[1:2] + p[3:])]
    joint = [first[::-1] for first in pyramids[:1] if len(first) > 1]  # slower than apart in all measurements
    rest = [[p] for pyramid in pyramids[1:] for p in pyramid]
    return [*([p] for p in pyramids[0]), *joint, *products[:2], *rest, *products[2::3], *stems]


def operands(members: Sequence[Problem]) -> dict[str, tuple[list[Any], list[Any]]]:
    """Returns the two arguments of each direction, random, COPIES of each."""
    x, kernels = shapes(members)
    outs = [window(p).outputs(x.shape[1:3], k.shape) for p, k in zip(members, kernels, strict=True)]
    values = noise(str(x.dtype))

    def draw(seed: int, shape: Sequence[int]) -> list[jax.Array]:
        size = math.prod(shape)
        firsts = [1000 * seed + 100 * copy for copy in range(COPIES)]
        return [jnp.resize(values[first : first + size], shape) for first in firsts]

    xs = draw(0, x.shape)
    ks = list(zip(*(draw(1, k.shape) for k in kernels), strict=True))
    dys = [draw(2, (x.shape[0], *out, p.features)) for p, out in zip(members, outs, strict=True)]
    dys = list(zip(*dys, strict=True))
    return {'forward': (xs, ks), 'input_gradient': (ks, dys), 'weight_gradient': (xs, dys)}


@functools.cache
def noise(dtype: str) -> jax.Array:
    """Returns random values of a normal distribution; NOISE of them on a GPU."""
    count = NOISE if jax.devices()[0].platform == 'gpu' else 2**20
    return jax.jit(lambda key: jax.random.normal(key, (count,), dtype))(jax.random.key(0))


def measure(members: Sequence[Problem], about: dict[str, Any], jobs: Sequence[tuple[Way, str]]) -> None:
    """Prints a line for each way and direction, in ms for one convolution of a batch.

    XLA's own is measured in each of these directions, because the results are compared with its result.
    """
    given = operands(members)
    first = next(iter(ways(members)))
    asked = {direction for _, direction in jobs}
    jobs = [(first, d) for d in first.directions if d in asked] + [
        (way, d) for way, d in jobs if way.label != first.label
    ]
    references: dict[str, list[jax.Array]] = {}
    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:  # all before the first measurement
        programs = list(pool.map(lambda job: compiled(job[0].directions[job[1]], given[job[1]]), jobs))
    for (way, direction), program in zip(jobs, programs, strict=True):
        record = {**about, 'direction': direction, **way.label}
        try:
            if isinstance(program, Exception):
                raise program
            result = jax.tree.leaves(program(*given[direction])[0])
            record['error'] = distance(result, references.setdefault(direction, result))
            took = common.per_call(lambda p=program, d=direction: p(*given[d]), jax.block_until_ready)
            record['ms'] = round(1e3 * took / COPIES, 4)
        except Exception as e:  # too little memory, or not supported: the others are measured
            record['failed'] = f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
        common.emit(record, None)


def compiled(function: Function, given: tuple[list[Any], list[Any]]) -> Any:
    """Compiles a function of one pair of arguments for all copies; returns the error if that fails."""

    def all_copies(firsts: list[Any], seconds: list[Any]) -> list[Any]:
        return [function(a, b) for a, b in zip(firsts, seconds, strict=True)]

    try:
        return jax.jit(all_copies).lower(*given).compile()
    except Exception as e:
        return e


def distance(results: Sequence[jax.Array], references: Sequence[jax.Array]) -> float:
    """Returns the largest norm of a difference, relative to the norm of the reference."""

    @jax.jit
    def relative(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    pairs = zip(results, references, strict=True)
    return round(max(float(relative(a, b)) for a, b in pairs), 5)


def in_torch(p: Problem, about: dict[str, Any]) -> None:
    """Prints a line for each direction and memory layout of PyTorch."""
    on_gpu = jax.devices()[0].platform == 'gpu'
    torch.backends.cudnn.benchmark = True
    like: dict[str, Any] = {'device': 'cuda' if on_gpu else 'cpu', 'dtype': getattr(torch, p.dtype)}
    after = -(-p.size // p.stride)
    settings = None, [p.stride] * 2, [p.kernel // 2] * 2, [1, 1], False, [0, 0], p.groups
    backward = torch.ops.aten.convolution_backward

    def wait(_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()

    for side, layout in (('nchw', torch.contiguous_format), ('channels-last', torch.channels_last)):

        def draw(*shape: int, layout=layout) -> list[torch.Tensor]:
            return [torch.randn(shape, **like).contiguous(memory_format=layout) for _ in range(COPIES)]

        xs, dys = draw(p.batch, p.channels, p.size, p.size), draw(p.batch, p.features, after, after)
        ks = draw(p.features, p.channels // p.groups, p.kernel, p.kernel)
        copies = list(zip(xs, ks, dys, strict=True))
        runs = {
            'forward': lambda c=copies: [torch.convolution(x, k, *settings) for x, k, _ in c],
            'input_gradient': lambda c=copies: [
                backward(dy, x, k, *settings, [True, False, False]) for x, k, dy in c
            ],
            'weight_gradient': lambda c=copies: [
                backward(dy, x, k, *settings, [False, True, False]) for x, k, dy in c
            ],
        }
        for direction, run in runs.items():
            record = {**about, 'direction': direction, 'side': f'torch-{side}'}
            try:
                record['ms'] = round(1e3 * common.per_call(run, wait) / COPIES, 4)
            except RuntimeError as e:
                record['failed'] = f'{type(e).__name__}: {" ".join(str(e).split())[:300]}'
            common.emit(record, None)


if __name__ == '__main__':
    main()
