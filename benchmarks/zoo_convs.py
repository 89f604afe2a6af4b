"""Speed of single convolutions of ten networks: `grouped_conv`, XLA's own lowering, and PyTorch.

    python benchmarks/zoo_convs.py --out results.jsonl --plot ratios.png
    python benchmarks/zoo_convs.py --only resnext-50 convnext-t-7x768-k7-g768 --skip-stock

Every convolution is measured forward, and forward with both gradients. The sides take turns in one
process, and the median of the rounds counts; XLA's own is measured once where it takes over a second.
PyTorch runs on all cores, with NCHW and with channels_last; the faster one counts. Each convolution
prints a line: times in ms, 'ratios' of the other sides' times to ours, and the seconds that compiling
forward and backward took (unset JAX_COMPILATION_CACHE_DIR for these). Convolutions that --out already
holds, from the same device, batch and dtype, are not repeated. The last line has the geometric mean and
the worst case of each ratio.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leave GPU memory for PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import torch
import zoo_plot
from jax import lax
from zoo_shapes import CONVS, Conv

from epsanet_jax.ops import grouped_conv

SIDES = ('ours', 'stock', 'torch-nchw', 'torch-channels-last')
DIRECTIONS = ('forward', 'forward_backward')
TOLERANCE = {'float32': 2e-3, 'bfloat16': 0.05}  # of the largest value
SLOW = 1.0  # seconds after which XLA's own convolution is not repeated


class Side(NamedTuple):
    """A way to compute a convolution."""

    runs: dict[str, Callable[[], Any]]  # starts the work of a direction
    wait: Callable[[Any], Any]  # returns when the result is computed
    compile_s: float | None = None


def main() -> None:
    """Measures what is missing, prints a line for each convolution and the summary, and draws."""
    args = _parse()
    wanted = [c for c in CONVS if not args.only or {c.name, c.family} & set(args.only)]
    device = common.describe_device()
    key = {'benchmark': 'zoo_convs', 'platform': device['platform'], 'device': device['device']}
    key |= {'batch': args.batch, 'dtype': args.dtype}
    done = {}
    for record in _read(args.out):
        known = all(record.get(k) == v for k, v in key.items())
        if known and (args.skip_stock or 'stock_forward' in record['ratios']):
            done[record['name']] = record
    missing = [conv for conv in wanted if conv.name not in done]
    start = time.perf_counter()
    for i, conv in enumerate(missing):
        spent = time.perf_counter() - start
        left = f', about {spent / i * (len(missing) - i) / 60:.0f} min left' if i else ''
        common.log(f'{i + 1} of {len(missing)}{left}: {conv.name}')
        record = {**key, **device, 'torch': torch.__version__, 'name': conv.name, **conv._asdict()}
        record |= measure(conv, args)
        common.emit(record, args.out)
        done[conv.name] = record
    records = [done[conv.name] for conv in wanted]
    common.emit({**key, 'benchmark': 'zoo_convs_summary', **summary(records)}, None)
    if args.plot:
        zoo_plot.draw(records, args.plot)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = {name for conv in CONVS for name in (conv.name, conv.family)}
    parser.add_argument('--only', nargs='+', metavar='NAME', help='networks, or single convolutions')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--dtype', choices=TOLERANCE, default='float32')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each side')
    parser.add_argument('--skip-stock', action='store_true', help="do not measure XLA's own lowering")
    parser.add_argument('--out', type=Path, help='append the lines to this file, and skip what it holds')
    parser.add_argument('--plot', type=Path, help='draw the ratios into this image')
    args = parser.parse_args()
    unknown = sorted(set(args.only or ()) - names)
    if unknown:
        parser.error(f'no convolution is named {unknown[0]!r}; the names are ' + ', '.join(sorted(names)))
    return args


def _read(out: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []


def measure(conv: Conv, args: argparse.Namespace) -> dict[str, Any]:
    """Returns times in ms, compile times in s, and ratios of a convolution."""
    sides = dict(prepare(conv, args))
    check(conv, sides, TOLERANCE[args.dtype])
    times: dict[str, dict[str, list[float]]] = {d: {side: [] for side in sides} for d in DIRECTIONS}
    once = set()
    if 'stock' in sides:
        for direction, run in sides['stock'].runs.items():
            start = time.perf_counter()
            sides['stock'].wait(run())
            took = time.perf_counter() - start
            if took > SLOW:
                once.add(direction)
                times[direction]['stock'].append(took)
    for _ in range(args.rounds):
        for name, side in sides.items():
            time.sleep(0.2)  # until the other side's threads have stopped spinning
            for direction, run in side.runs.items():
                if name != 'stock' or direction not in once:
                    times[direction][name].append(common.seconds(run, side.wait, budget=0.1))
    ms = {d: {side: 1e3 * statistics.median(t) for side, t in times[d].items()} for d in DIRECTIONS}
    ratios = {}
    for d in DIRECTIONS:
        ratios[f'torch_{d}'] = min(t for side, t in ms[d].items() if side.startswith('torch')) / ms[d]['ours']
        if 'stock' in sides:
            ratios[f'stock_{d}'] = ms[d]['stock'] / ms[d]['ours']
    return {
        'ms': {d: {side: round(t, 3) for side, t in ms[d].items()} for d in DIRECTIONS},
        'compile_s': {
            name: round(side.compile_s, 2) for name, side in sides.items() if side.compile_s is not None
        },
        'ratios': {name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def prepare(conv: Conv, args: argparse.Namespace) -> Iterator[tuple[str, Side]]:
    """Yields every side with the same images, kernel and output gradient."""
    rng = np.random.default_rng(0)
    after = -(-conv.size // conv.stride)
    x, dy = (
        rng.standard_normal((args.batch, size, size, channels), np.float32)
        for size, channels in ((conv.size, conv.inputs), (after, conv.outputs))
    )
    shape = conv.kernel, conv.kernel, conv.inputs // conv.groups, conv.outputs
    kernel = rng.standard_normal(shape, np.float32)
    options = {'stride': conv.stride, 'dilation': conv.dilation, 'groups': conv.groups}
    arrays = [jnp.asarray(array, args.dtype) for array in (x, kernel, dy)]
    yield 'ours', jax_side(functools.partial(grouped_conv, **options), *arrays)
    if not args.skip_stock:
        yield 'stock', jax_side(functools.partial(stock, **options), *arrays)
    for side in SIDES[2:]:
        yield side, torch_side(side == 'torch-channels-last', options, args.dtype, x, kernel, dy)


def stock(x: jax.Array, kernel: jax.Array, *, stride: int, dilation: int, groups: int) -> jax.Array:
    """Returns the convolution as XLA lowers it."""
    padding = [(dilation * (kernel.shape[0] // 2),) * 2] * 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def jax_side(convolve: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, dy: jax.Array) -> Side:
    """Compiles a convolution of JAX for both directions."""

    def both(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, transpose = jax.vjp(convolve, x, kernel)
        return y, *transpose(dy)

    forward = jax.jit(convolve).lower(x, kernel).compile()
    start = time.perf_counter()
    backward = jax.jit(both).lower(x, kernel, dy).compile()
    compile_s = time.perf_counter() - start
    runs = {'forward': lambda: forward(x, kernel), 'forward_backward': lambda: backward(x, kernel, dy)}
    return Side(runs, jax.block_until_ready, compile_s)


def torch_side(channels_last: bool, options: dict[str, int], dtype: str, *arrays: np.ndarray) -> Side:
    """Prepares a convolution of PyTorch in one of its memory layouts."""
    on_gpu = jax.devices()[0].platform == 'gpu'
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    like: dict[str, Any] = {'device': 'cuda' if on_gpu else 'cpu', 'dtype': getattr(torch, dtype)}
    orders = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # of the images, the kernel and the output's gradient
    x, kernel, dy = (
        torch.from_numpy(array).permute(order).to(**like).contiguous(memory_format=memory_format)
        for array, order in zip(arrays, orders, strict=True)
    )
    x.requires_grad_()
    kernel.requires_grad_()
    padding = options['dilation'] * (kernel.shape[2] // 2)
    convolve = functools.partial(torch.nn.functional.conv2d, padding=padding, **options)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return convolve(x, kernel)

    def both() -> tuple[torch.Tensor | None, ...]:
        x.grad = kernel.grad = None
        y = convolve(x, kernel)
        y.backward(dy)
        return y.detach(), x.grad, kernel.grad

    def wait(_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()

    return Side({'forward': forward, 'forward_backward': both}, wait)


def check(conv: Conv, sides: dict[str, Side], tolerance: float) -> None:
    """Compares our result and gradients with PyTorch's."""
    ours = sides['ours'].runs['forward_backward']()
    theirs = sides['torch-nchw'].runs['forward_backward']()
    for name, a, b, order in zip(
        ('result', 'input gradient', 'kernel gradient'),
        ours,
        theirs,
        ((0, 2, 3, 1), (0, 2, 3, 1), (2, 3, 1, 0)),
        strict=True,
    ):
        a, b = np.asarray(a, np.float32), b.permute(order).float().cpu().numpy()
        difference = np.abs(a - b).max() / np.abs(b).max()
        if difference > tolerance:
            raise SystemExit(f'error: the {name} of {conv.name} differs by {difference:.1e} from PyTorch')


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the geometric mean and the worst case of each ratio."""
    found: dict[str, Any] = {'convolutions': len(records)}
    for ratio in sorted(set.intersection(*(set(record['ratios']) for record in records))):
        values = {record['name']: record['ratios'][ratio] for record in records}
        worst = min(values, key=lambda name: values[name])
        mean = round(statistics.geometric_mean(values.values()), 3)
        found[ratio] = {'geometric_mean': mean, 'worst': values[worst], 'worst_name': worst}
    return found


if __name__ == '__main__':
    main()
