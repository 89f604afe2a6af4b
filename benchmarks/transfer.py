"""Does starting from a ResNet help? Top-1 of a small EPSANet on five classes after 1, 5 and 15 epochs.

    python benchmarks/transfer.py DATA --out runs/transfer     # DATA: train/ and val/, one folder per class

A small ResNet is trained on the first half of the classes. EPSANets of the same widths are then trained on
the other half with every seed, started in one of these ways:

    drawn        all weights are drawn
    kernels      `weights.start_from`: what fits is taken; each branch of a pyramid starts with the ResNet's
                 3x3 kernel in its middle; statistics of BatchNorms behind pyramids are reset
    partial      the same, but pyramids are drawn
    statistics   as partial, but these statistics are taken too

Finished runs are not repeated. Prints one line of JSON per run, and one per way and epoch with mean and
standard error. --plot FILE draws the means after every epoch.
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
import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from epsanet_jax.commands.common import use_persistent_cache
from epsanet_jax.convert.state_dict import from_torch, to_torch
from epsanet_jax.models.epsanet import abstract_images
from epsanet_jax.models.zoo import build_model
from epsanet_jax.training.config import Config
from epsanet_jax.training.loop import train
from epsanet_jax.weights import Network, load, start_from

WAYS = ('drawn', 'statistics', 'partial', 'kernels')
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
    curves: dict[str, list[list[float]]] = {}
    for way in args.ways:
        curves[way] = []
        for seed in args.seeds:
            workdir = args.out / f'{way}-{seed}'
            config = recipe(args, second, seed, EPOCHS[-1])
            train(config, str(workdir), init_from=start(way, source, config, second))
            curves[way].append(read_top1(workdir))
            top1 = {epoch: curves[way][-1][epoch - 1] for epoch in EPOCHS}
            common.emit({**shared, 'start': way, 'seed': seed, 'top1_%': top1}, args.json)
        for epoch in EPOCHS:
            values = [curve[epoch - 1] for curve in curves[way]]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            summary = {'start': way, 'epoch': epoch, 'runs': len(values)}
            summary |= {'top1_mean_%': round(statistics.mean(values), 2), 'standard_error_%': round(error, 2)}
            common.emit({**shared, **summary}, args.json)
    if args.plot:
        plot(curves, args.plot)


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
    key = jax.random.key(config.seed)
    variables, report = start_from(source, model, key, with_classifier=False)
    for line in report:
        common.log(f'{way}: {line}')
    if way == 'kernels':
        return Network(model, variables, names)
    given, tensors = dict(source.state_dict), to_torch(variables, model)
    drawn = to_torch(model.init(key, np.zeros(abstract_images(model).shape, np.float32)), model)
    tensors |= {name: drawn[name] for name in tensors if '.conv2.conv_' in name}
    if way == 'statistics':
        tensors |= {name: given[name] for name in tensors if 'bn2.running' in name}
    return Network(model, from_torch(tensors, model), names)


def read_top1(workdir: Path) -> list[float]:
    """Returns the top-1 accuracy in percent after each epoch."""
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    found = [round(100 * line['top1'], 2) for line in lines if line['split'] == 'eval']
    return found[: EPOCHS[-1]]  # the last evaluation is repeated at the end


def plot(curves: dict[str, list[list[float]]], image: Path) -> None:
    """Draws the mean of each way's curves, with a band from the lowest to the highest."""
    figure, axis = plt.subplots(figsize=(6, 4), layout='constrained')
    for way, runs in curves.items():
        values = np.array(runs)
        epochs = np.arange(1, values.shape[1] + 1)
        (line,) = axis.plot(epochs, values.mean(0), label=way)
        axis.fill_between(
            epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0
        )
    axis.set(xlabel='epochs', ylabel='top-1, %', xlim=(1, None))
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.3)
    axis.legend(title='start', frameon=False)
    figure.savefig(image, dpi=120)


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
    parser.add_argument('--plot', type=Path, help='image to write')
    parser.add_argument('--json', type=Path, help='file to append the results to')
    return parser.parse_args()


if __name__ == '__main__':
    main()
