"""Speed of the training step and of inference, compared with PyTorch.

    python benchmarks/train_step.py --model epsanet50_small --batch 8 --dtype float32
    python benchmarks/train_step.py --batch 256 --dtype bfloat16 --sides ours torch-channels-last-compiled

The sides take turns in one process, with uint8 images that are already on the device. Each side prints a line
with its median. PyTorch runs with NCHW and with channels_last, eager or compiled, with autocast if the dtype
is bfloat16. 'train' is forward pass, backward pass and the update by SGD with momentum.
'forward' is the evaluation step. 'inference' is the same forward pass, on our side with BatchNorm folded into
the convolutions as in `epsanet predict`. 'ratio' is a side's images per second divided by those of the
fastest PyTorch side. With --queued, 'ms_queued' is the time of a step if the program does not wait for each,
as in training.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leave GPU memory for PyTorch

import jax
import jax.numpy as jnp
import numpy as np

from epsanet_jax.commands.common import use_persistent_cache
from epsanet_jax.data.augment import normalize
from epsanet_jax.models import EPSANet, create_model, fold_batch_norm
from epsanet_jax.training import sharding, steps
from epsanet_jax.training.config import DataConfig, OptimizerConfig
from epsanet_jax.training.malloc import allocate_in_main_thread, keep_freed_memory
from epsanet_jax.training.optimizer import make_optimizer
from epsanet_jax.training.state import create_state

DATA = DataConfig()  # mean and std of the images
SMOOTHING = 0.1
LR = 1e-3
SMALL = {'layers': (1,), 'planes': (8,)}
SMALL_PYRAMID = {'kernels': (3, 5), 'groups': (1, 2), 'reduction': 2}
LAYOUTS = ('nchw', 'channels-last')
TORCH_SIDES = tuple(f'torch-{layout}{how}' for layout in LAYOUTS for how in ('', '-compiled'))
MODES = ('forward', 'inference', 'train')


class Step(NamedTuple):
    """A program to measure.

    Attributes:
        start: starts a step.
        wait: returns when all steps have ended.
    """

    start: Callable[[], Any]
    wait: Callable[[], Any]

    def __call__(self) -> None:
        """Runs a step and waits for it."""
        self.start()
        self.wait()


def main() -> None:
    """Measures every side in turn and prints a line for each."""
    args = _parse()
    use_persistent_cache()
    allocate_in_main_thread()
    device = common.describe_device()
    for mode in args.modes:
        sides: dict[str, Step] = {}
        facts: dict[str, dict[str, Any]] = {side: {} for side in args.sides}
        for side in args.sides:
            common.log(f'{mode}: preparing {side}')
            prepare = ours if side == 'ours' else functools.partial(torch_step, side=side)
            sides[side] = prepare(args, mode, facts[side])
        if args.keep_memory and jax.devices()[0].platform == 'cpu':
            keep_freed_memory()
        times = in_turn(sides, args.rounds)
        best = min((t for side, t in times.items() if side != 'ours'), default=None)
        if args.queued:
            for side, step in sides.items():
                took = common.queued(step.start, lambda _, s=step: s.wait(), args.queued)
                facts[side]['ms_queued'] = round(1e3 * took, 2)
        for side, took in times.items():
            record = {'benchmark': 'train_step', **device, 'model': args.model, 'side': side, 'mode': mode}
            record |= {'batch': args.batch, 'dtype': args.dtype, 'image_size': args.image_size}
            record |= {'keep_memory': True} if args.keep_memory else {}
            record |= {'images_per_s': round(args.batch / took, 2), 'ms': round(1e3 * took, 2)}
            record |= {'ratio': round(best / took, 3) if best else None, **facts[side]}
            moved = facts[side].get('bytes')
            if args.bandwidth and moved:
                record['share_of_bytes_floor'] = round(moved / (args.bandwidth * 1e12) / took, 3)
            common.emit(record, args.out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--model', default='epsanet50_small')
    parser.add_argument('--small', action='store_true', help='one block with few channels, for a rehearsal')
    parser.add_argument('--conv', default='auto', help='convolution algorithm of our side')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--image-size', type=int, default=224)
    parser.add_argument('--modes', nargs='+', choices=MODES, default=['forward', 'train'])
    parser.add_argument('--rounds', type=int, default=7, help='number of rounds')
    parser.add_argument(
        '--queued', type=int, default=0, metavar='N', help='also time N steps without waiting for each'
    )
    sides = ('ours', *TORCH_SIDES)
    eager = [side for side in sides if not side.endswith('compiled')]
    parser.add_argument('--sides', nargs='+', choices=sides, default=eager, help='programs to measure')
    parser.add_argument(
        '--keep-memory', action='store_true', help='keep freed memory as train.py does, for all sides'
    )
    parser.add_argument(
        '--bandwidth',
        type=float,
        metavar='TB/S',
        help="device's memory bandwidth: also print the share of it used",
    )
    parser.add_argument('--out', type=Path, help='append the lines to this file')
    return parser.parse_args()


def in_turn(sides: dict[str, Step], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each side; they take turns, so that a slow moment affects all of them.

    Each turn runs two steps and times the second one. The first restores what consecutive steps would have
    kept: caches, and memory that a virtual machine has returned to its host in between.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for i in range(rounds):
        for name, run in sides.items():
            time.sleep(0.5 if len(sides) > 1 else 0)  # until the other side's threads have stopped spinning
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        common.log(f'round {i + 1} of {rounds}: ' + ', '.join(f'{n} {t[-1]:.3f} s' for n, t in times.items()))
    return {name: statistics.median(t) for name, t in times.items()}


def make_batch(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns random images and labels."""
    rng = np.random.default_rng(0)
    shape = (args.batch, args.image_size, args.image_size, 3)
    images = rng.integers(0, 256, shape, np.uint8)
    return {'image': images, 'label': rng.integers(0, 1000, args.batch).astype(np.int32)}


def make_model(args: argparse.Namespace, **settings: Any) -> EPSANet:
    """Returns the network to measure."""
    if args.small:
        settings |= SMALL | (SMALL_PYRAMID if args.model.startswith('epsanet') else {})
    return create_model(args.model, dtype=jnp.dtype(args.dtype), conv=args.conv, **settings)


def first_state(model: Any, optimizer: Any, mesh: Any) -> Any:
    """Returns a state placed as a step's results are: otherwise the second step is compiled again."""
    init = jax.jit(
        lambda key: create_state(model, optimizer, key, 64), out_shardings=sharding.replicated(mesh)
    )
    return init(jax.random.key(0))


def ours(args: argparse.Namespace, mode: str, facts: dict[str, Any], hlo: Path | None = None) -> Step:
    """Compiles our step and writes its compile time and memory into `facts`, and its text into a file."""
    model = make_model(args)
    mesh = sharding.make_mesh(args.batch)
    optimizer = make_optimizer(OptimizerConfig(), lambda step: LR)
    state = first_state(model, optimizer, mesh)
    batch = make_batch(args)
    if mode == 'forward':
        batch['mask'] = np.ones(args.batch, bool)
        step: Any = steps.make_eval_step(model, mesh, smoothing=SMOOTHING, mean=DATA.mean, std=DATA.std)
        carried: Any = state.variables
    elif mode == 'inference':
        folded, carried = fold_batch_norm(model, state.variables)

        @jax.jit
        def step(variables: Any, batch: Any) -> jax.Array:
            return folded.apply(variables, normalize(batch['image'], DATA.mean, DATA.std, model.dtype))

    else:
        step = steps.make_train_step(
            model, optimizer, mesh, smoothing=SMOOTHING, mean=DATA.mean, std=DATA.std
        )
        carried = state
    on_device = sharding.to_devices(batch, mesh)
    start = time.perf_counter()
    compiled = step.lower(carried, on_device).compile()
    facts['compile_s'] = round(time.perf_counter() - start, 1)
    facts['conv'] = args.conv
    if hlo:
        hlo.write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    facts['peak_bytes'] = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    facts['bytes'] = (compiled.cost_analysis() or {}).get('bytes accessed')

    result = None

    def run() -> None:
        nonlocal carried, result
        result = compiled(carried, on_device)
        if mode == 'train':
            carried, _ = result

    return Step(run, lambda: jax.block_until_ready(result))


def torch_step(args: argparse.Namespace, mode: str, facts: dict[str, Any], side: str) -> Step:
    """Prepares the same step in PyTorch and writes version and memory into `facts`."""
    import torch

    from epsanet_jax.convert import torch_model

    on_gpu = jax.devices()[0].platform == 'gpu'
    device = torch.device('cuda' if on_gpu else 'cpu')
    memory_format = torch.channels_last if 'channels-last' in side else torch.contiguous_format
    torch.backends.cudnn.benchmark = True  # chooses the fastest algorithm, as XLA does
    net: Any = torch_model.EPSANet(make_model(args)).to(device, memory_format=memory_format)
    net.train(mode == 'train')
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
    batch = make_batch(args)
    images = torch.from_numpy(batch['image']).to(device).permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=memory_format)
    labels = torch.from_numpy(batch['label']).long().to(device)
    mean = torch.tensor(DATA.mean, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(DATA.std, device=device).view(1, 3, 1, 1) * 255
    half = args.dtype == 'bfloat16'
    facts['torch'] = torch.__version__
    if side.endswith('compiled'):
        net = torch.compile(net)

    def forward():
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return net((images - mean) / std)

    def run() -> None:
        if mode != 'train':
            with torch.no_grad():
                forward()
        else:
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(forward().float(), labels, label_smoothing=SMOOTHING)
            loss.backward()
            optimizer.step()

    step = Step(run, torch.cuda.synchronize if on_gpu else lambda: None)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        facts['peak_bytes'] = torch.cuda.max_memory_allocated()
    return step


if __name__ == '__main__':
    main()
