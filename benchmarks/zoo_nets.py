"""Speed of a training step of ResNeXt-50 (32x4d) and ConvNeXt: Flax's Conv, ours, and PyTorch.

    python benchmarks/zoo_nets.py --model resnext50 --out results.jsonl
    python benchmarks/zoo_nets.py --model convnext_atto --batch 16 --sides ours torch

The networks are in zoo_models.py. 'flax' and 'ours' are one network with `flax.linen.Conv` and with
`GroupedConv`; 'torch' is the network in PyTorch, eager, in both memory layouts. First the script checks that
all sides give the same logits with the same parameters. A step is forward pass, backward pass and the update
by SGD with momentum, in float32. The sides take turns in one process, and each prints a line with its median.
A side that is much slower than the others is measured once: on a CPU, a step of 'flax' can take minutes.
'ratio' is the time of the fastest PyTorch side divided by the side's; 'ratio_to_flax' is Flax's time divided
by the side's. 'loss' is that of the second step, which depends on the gradients of the first one.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leave GPU memory for PyTorch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import zoo_models
from zoo_models import MODELS, ConvNeXt, ResNeXt

from epsanet_jax.layers.linen import GroupedConv

LR = 0.01
SIDES = ('ours', 'flax', 'torch')
SLOW = 5  # times as long as the fastest side: measured once
Net = ResNeXt | ConvNeXt
Step = Callable[[], float]  # runs one training step and returns its loss


def main() -> None:
    """Checks the networks, measures every side in turn and prints a line for each."""
    args = _parse()
    net = MODELS[args.model]
    images, labels = make_batch(args.batch, args.size)
    variables = check(net, args.sides, images[:2])
    device = {**common.describe_device(), 'torch': torch.__version__}
    sides, compile_s = {}, {}
    for side in args.sides:
        if side == 'torch':
            for layout in ('nchw', 'channels-last'):
                sides[f'torch-{layout}'] = torch_step(net, variables, layout, images, labels)
        else:
            sides[side], compile_s[side] = jax_step(with_conv(net, side), side, variables, images, labels)
    times, losses = in_turn(sides, args.rounds)
    seconds = {side: statistics.median(t) for side, t in times.items()}
    best = min((t for side, t in seconds.items() if side.startswith('torch')), default=None)
    for side, took in seconds.items():
        record = {'benchmark': 'zoo_nets', **device, 'model': args.model, 'side': side, 'batch': args.batch}
        record |= {'image_size': args.size, 's_per_step': round(took, 6), 'steps_timed': len(times[side])}
        record |= {'compile_s': compile_s.get(side), 'loss': round(losses[side], 4)}
        record |= {'ratio': round(best / took, 3) if best else None}
        record |= {'ratio_to_flax': round(seconds['flax'] / took, 2) if 'flax' in seconds else None}
        common.emit(record, args.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--model', choices=MODELS, default='resnext50')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=224, help='height and width of the images')
    parser.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
    parser.add_argument('--rounds', type=int, default=7, help='timed steps of each side')
    parser.add_argument('--out', type=Path, help='append the lines to this file')
    return parser.parse_args()


def make_batch(batch: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random images [N, size, size, 3] and labels [N]."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, 3), np.float32)
    return images, rng.integers(0, 1000, batch).astype(np.int32)


def with_conv(net: Net, side: str) -> Net:
    """Returns the network with the convolutions of a side."""
    return net.clone(conv=GroupedConv) if side == 'ours' else net


def check(net: Net, sides: tuple[str, ...], images: np.ndarray) -> Any:
    """Returns initial variables, after a check that all sides accept them and give the same logits."""
    common.log('checking that the sides compute the same network')
    initial, logits = {}, {}
    for side in sides:
        if side != 'torch':
            model = with_conv(net, side)
            initial[side] = jax.jit(model.init)(jax.random.key(0), images)
    variables = next(iter(initial.values()), None) or jax.jit(net.init)(jax.random.key(0), images)
    for side in sides:
        if side == 'torch':
            with torch.no_grad():
                twin = zoo_models.to_torch(net, variables).eval()
                logits[side] = twin(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        else:
            logits[side] = np.asarray(jax.jit(with_conv(net, side).apply)(variables, images))
    reference = next(iter(logits.values()))
    for side, values in logits.items():
        difference = np.abs(values - reference).max() / np.abs(reference).max()
        if difference > 1e-3:
            raise SystemExit(f'error: the logits of {side} differ by {difference:.1e} of the largest one')
    for side, values in initial.items():
        equal = jax.tree.map(lambda a, b: np.array_equal(a, b), values, variables)
        if jax.tree.structure(values) != jax.tree.structure(variables) or not jax.tree.all(equal):
            raise SystemExit(f'error: the initial parameters of {side} differ from those of {sides[0]}')
    return variables


def jax_step(
    net: Net, side: str, variables: Any, images: np.ndarray, labels: np.ndarray
) -> tuple[Step, float]:
    """Returns the training step of a network of Flax, and the seconds that its compilation took."""
    optimizer = optax.sgd(LR, momentum=0.9)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        params, statistics, moments = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            given = {'params': params, **statistics}
            logits, updated = net.apply(given, images, train=True, mutable=['batch_stats'])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), statistics, moments), value

    copied = jax.tree.map(jnp.copy, variables)
    params = copied.pop('params')
    state = params, copied, optimizer.init(params)
    batch = jax.device_put((images, labels))
    common.log(f'compiling {side}')
    start = time.perf_counter()
    compiled = step.lower(state, *batch).compile()
    compile_s = round(time.perf_counter() - start, 1)

    def run() -> float:
        nonlocal state
        state, value = jax.block_until_ready(compiled(state, *batch))
        return float(value)

    return run, compile_s


def torch_step(net: Net, variables: Any, layout: str, images: np.ndarray, labels: np.ndarray) -> Step:
    """Returns the training step of the network in PyTorch."""
    on_gpu = jax.devices()[0].platform == 'gpu'
    device = torch.device('cuda' if on_gpu else 'cpu')
    memory_format = torch.channels_last if layout == 'channels-last' else torch.contiguous_format
    model: Any = zoo_models.to_torch(net, variables).to(device, memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    y = torch.from_numpy(labels).long().to(device)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return loss.item()

    return run


def in_turn(sides: dict[str, Step], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns the seconds of each side's timed steps, and the loss of its second step.

    Each turn runs two steps and times the second one, as in `train_step.py`; a slow side has one turn, with
    one step.
    """
    first: dict[str, float] = {}
    for name, run in sides.items():
        common.log(f'first step of {name}{" (minutes, on a CPU)" if name == "flax" else ""}')
        start = time.perf_counter()
        run()
        first[name] = time.perf_counter() - start
        common.log(f'first step of {name}: {first[name]:.3f} s')
    slow = {name for name, t in first.items() if t > SLOW * min(first.values())}
    turn = 2 * sum(t for name, t in first.items() if name not in slow)
    once = sum(first[name] for name in slow)
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    for i in range(rounds):
        left = turn * (rounds - i) + (0 if i else once)
        common.log(f'round {i + 1} of {rounds}, about {left / 60:.1f} min left')
        for name, run in sides.items():
            if name in slow and i:
                continue
            time.sleep(0.5)  # until the other side's threads have stopped spinning
            if name not in slow:
                losses.setdefault(name, run())
            start = time.perf_counter()
            loss = run()
            times[name].append(time.perf_counter() - start)
            losses.setdefault(name, loss)
    return times, losses


if __name__ == '__main__':
    main()
