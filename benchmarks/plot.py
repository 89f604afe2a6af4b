"""Draws docs/performance.png: the cost per image on a TPU, by the compiler's count, and the speed on a CPU.

python benchmarks/plot.py benchmarks/results docs/performance.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

SHOWN = ('epsanet50_small', 8, 'float32')
COLOURS = {'ours': 'C0', 'torch-nchw': 'C7', 'torch-channels-last': 'C8'}


def main() -> None:
    """Reads the results and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('results', type=Path, help='folder of .jsonl files')
    parser.add_argument('picture', type=Path, help='file to write')
    args = parser.parse_args()
    files = sorted(args.results.glob('*.jsonl'))
    lines = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    _tpu(axes[0], [x for x in lines if x['benchmark'] == 'tpu_cost' and x['topology'] == 'v5e:2x4'])
    _cpu(axes[1], [x for x in lines if x['benchmark'] == 'train_step' and x['platform'] == 'cpu'])
    figure.savefig(args.picture, dpi=120)


def _tpu(axis, lines) -> None:
    bars = {f'{x["model"]}, {x["conv"]}': x for x in lines if 'block' not in x}
    bars = dict(sorted(bars.items(), key=lambda item: item[1]['cycles_per_image']))
    names = [name.replace('resnet50, auto', 'resnet50') for name in bars]
    cost = [x['cycles_per_image'] / 1e6 for x in bars.values()]
    axis.barh(names, cost, color=['C7' if n.startswith('resnet') else 'C0' for n in names])
    for row, value in enumerate(cost):
        axis.text(value, row, f' {value:.2f}', va='center')
    axis.set_xlim(0, 1.15 * max(cost))
    axis.set_title('TPU v5e, training, bf16, 128 images a chip', fontsize=10)
    axis.set_xlabel("million cycles per image, the compiler's estimate")


def _cpu(axis, lines) -> None:
    plain = [x for x in lines if (x['model'], x['batch'], x['dtype']) == SHOWN and 'settings' not in x]
    plain.sort(key=lambda x: x.get('keep_memory', False))  # a train step as train.py makes it
    latest = {(x['mode'], x['side']): x for x in plain}
    modes = ['inference', 'forward', 'train']
    for i, (side, colour) in enumerate(COLOURS.items()):
        for m, mode in enumerate(modes):
            if (mode, side) in latest:
                ratio = latest[mode, side]['ratio']
                axis.bar(m + 0.27 * (i - 1), ratio, 0.25, color=colour, label=side if m == 0 else None)
                axis.text(m + 0.27 * (i - 1), ratio, f'{ratio:.2f}', ha='center', va='bottom')
    axis.set_xticks(range(len(modes)), modes)
    axis.set_ylim(0, 1.5)
    axis.set_ylabel("speed / PyTorch's best")
    axis.set_title('CPU, 2 cores, float32, batch 8, epsanet50_small', fontsize=10)
    axis.legend(fontsize=8)


if __name__ == '__main__':
    main()
