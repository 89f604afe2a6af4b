"""Does starting from a ResNet help? Top-1 of a small EPSANet on five classes after 1, 5 and 15 epochs.

    python benchmarks/transfer.py DATA --out runs/transfer     # DATA: train/ and val/, one folder per class

A small ResNet is trained on the first half of the classes. EPSANets of the same widths are then trained on
the other half with every seed, started in one of these ways:

    drawn        all weights are drawn
    partial      `weights.start_from`: what fits is taken; statistics of BatchNorms behind pyramids are reset
    statistics   the same, but these statistics are taken too
    kernels      as partial, and each branch of a pyramid starts with the ResNet's 3x3 kernel in its middle

Finished runs are not repeated. Prints one line of JSON per run, and one per way with mean and standard error.
"""

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import accuracy
import common
import jax
import numpy as np

from epsanet_jax.commands.common import use_persistent_cache
from epsanet_jax.convert.state_dict import from_torch, to_torch
from epsanet_jax.models.zoo import build_model
from epsanet_jax.training.config import Config
from epsanet_jax.training.loop import train
from epsanet_jax.weights import Network, load, start_from

WAYS = ('drawn', 'partial', 'statistics', 'kernels')
EPOCHS = (1, 5, 15)


def main() -> None:
    """Trains the ResNet and the EPSANets, and prints the results."""
    args = _parse()
    use_persistent_cache()
    first, second = split_classes(args.data, args.out / 'classes')
    device = common.describe_device()
    shared = {'benchmark': 'transfer', **device, 'image_size': args.size}
    resnet = recipe(args, first, 0, args.source_epochs)
    resnet.model = dataclasses.replace(resnet.model, name='resnet50', kernels=(), groups=())
    train(resnet, str(args.out / 'resnet'))
    source = load(str(args.out / 'resnet'))
    for way in args.ways:
        found: dict[int, list[float]] = {epoch: [] for epoch in EPOCHS}
        for seed in args.seeds:
            workdir = args.out / f'{way}-{seed}'
            config = recipe(args, second, seed, EPOCHS[-1])
            train(config, str(workdir), init_from=start(way, source, config, second))
            top1 = read_top1(workdir)
            for epoch, value in top1.items():
                found[epoch].append(value)
            common.emit({**shared, 'start': way, 'seed': seed, 'top1_%': top1}, args.json)
        for epoch, values in found.items():
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            summary = {'start': way, 'epoch': epoch, 'runs': len(values)}
            summary |= {'top1_mean_%': round(statistics.mean(values), 2), 'standard_error_%': round(error, 2)}
            common.emit({**shared, **summary}, args.json)


def split_classes(data: Path, out: Path) -> tuple[Path, Path]:
    """Links the first and the second half of the classes into two datasets, and returns their folders."""
    halves = out / 'first', out / 'second'
    for split in ('train', 'val'):
        names = sorted(path.name for path in (data / split).iterdir() if path.is_dir())
        for i, name in enumerate(names):
            link = halves[2 * i >= len(names)] / split / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to((data / split / name).resolve())
    return halves


def recipe(args: argparse.Namespace, data: Path, seed: int, epochs: int) -> Config:
    """Returns the recipe of `accuracy`, evaluated after every epoch."""
    config = accuracy.recipe(argparse.Namespace(data=data, size=args.size, epochs=epochs), seed)
    config.eval_every_epochs = 1
    return config


def start(way: str, source: Network, config: Config, data: Path) -> Network | None:
    """Returns the network to start from; None: all weights are drawn."""
    if way == 'drawn':
        return None
    names = tuple(sorted(path.name for path in (data / 'train').iterdir()))
    model = build_model(config.model, len(names))
    variables, report = start_from(source, model, jax.random.key(config.seed), with_classifier=False)
    for line in report:
        common.log(f'{way}: {line}')
    given, tensors = dict(source.state_dict), to_torch(variables, model)
    if way == 'statistics':
        tensors |= {name: given[name] for name in tensors if 'bn2.running' in name}
    if way == 'kernels':
        for name in tensors:
            if '.conv2.conv_' in name:
                tensors[name] = in_the_middle(tensors[name], given, name)
    return Network(model, from_torch(tensors, model), names)


def in_the_middle(branch: np.ndarray, given: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Returns the part of a ResNet's 3x3 kernel that a branch can hold, in the middle of zeros."""
    block, _, place = name.removesuffix('.weight').rpartition('.conv2.conv_')
    kernel = given[f'{block}.conv2.weight']
    outputs, inputs, size, _ = branch.shape
    first = kernel.shape[0] - outputs * int(place)  # the largest kernel comes first
    groups = kernel.shape[1] // inputs
    margin, result = (size - 3) // 2, np.zeros_like(branch)
    for row in range(outputs):
        low = row // (outputs // groups) * inputs
        result[row, :, margin : margin + 3, margin : margin + 3] = kernel[first + row, low : low + inputs]
    return result


def read_top1(workdir: Path) -> dict[int, float]:
    """Returns the top-1 accuracy in percent after the epochs to report."""
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    evaluations = [line['top1'] for line in lines if line['split'] == 'eval']
    return {epoch: round(100 * evaluations[epoch - 1], 2) for epoch in EPOCHS}


def _parse() -> argparse.Namespace:
    parser: Any = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('data', type=Path, help='folder with train/ and val/')
    parser.add_argument('--out', type=Path, required=True, help='folder of the runs')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--source-epochs', type=int, default=30, help='epochs of the ResNet')
    parser.add_argument('--size', type=int, default=64, help='height and width of the images, pixels')
    parser.add_argument('--json', type=Path, help='file to append the results to')
    return parser.parse_args()


if __name__ == '__main__':
    main()
