"""Draws docs/performance.png: estimated cost per image on a TPU and measured speed on a CPU, by network.

python benchmarks/plot.py benchmarks/results docs/performance.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

CONVOLUTIONS = {
    'auto': ('epsanet_jax', 'C0'),
    'dense': ('dense convolutions', '#9ecae1'),
    'stock': ("XLA's grouped convolutions", '0.6'),
}
SIDES = {
    'ours': ('epsanet_jax', 'C0'),
    'torch-channels-last': ('PyTorch, channels_last', 'C1'),
    'torch-nchw': ('PyTorch, NCHW', '#fdd0a2'),
}
MODES = {'inference': 'inference, folded', 'forward': 'evaluation step', 'train': 'training step'}
FAMILIES = {'resnet': 'ResNet', 'seresnet': 'SE-ResNet', 'epsanet': 'EPSANet'}
Groups = dict[str, dict[str, tuple[float, str]]]  # group -> series -> value and text of the bar


def main() -> None:
    """Reads the results and writes the image."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('results', type=Path, help='folder of .jsonl files')
    parser.add_argument('image', type=Path, help='file to write')
    args = parser.parse_args()
    files = sorted(args.results.glob('*.jsonl'))
    lines = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    lines = [line for line in lines if 'benchmark' in line]  # not how the parts of a GPU's run ended
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout='constrained')
    draw(left, tpu_groups(lines), CONVOLUTIONS)
    left.set_title('TPU v5e: training, bfloat16, 128 images per chip')
    left.set_xlabel("million cycles per image, compiler's estimate (less is better)")
    draw(right, cpu_groups(lines), SIDES)
    right.set_title('CPU, 2 cores: float32, batch 8')
    right.set_xlabel('speed relative to channels_last (more is better)')
    figure.savefig(args.image, dpi=120)


def tpu_groups(lines: list[dict[str, Any]]) -> Groups:
    """Returns the cost of a training step of each network, with its ratio to the ResNet of the same depth."""
    steps = [x for x in lines if x['benchmark'] == 'tpu_cost' and x['topology'] == 'v5e:2x4']
    cycles = {(x['model'], x['conv']): x['cycles_per_image'] for x in steps if 'block' not in x}
    groups: Groups = {}
    for model in sorted({model for model, _ in cycles}, key=_depth_and_cost(cycles)):
        resnet = cycles.get((f'resnet{_depth(model)}', 'auto'))
        bars = groups[network_name(model)] = {}
        for conv in CONVOLUTIONS:
            if (model, conv) in cycles:
                cost = cycles[model, conv]
                ratio = f' ({cost / resnet:.2f}x ResNet)' if resnet and not model.startswith('resnet') else ''
                bars[conv] = cost / 1e6, f'{cost / 1e6:.2f}{ratio}'
    return groups


def cpu_groups(lines: list[dict[str, Any]]) -> Groups:
    """Returns the speed of every network and mode, relative to PyTorch with channels_last."""
    chosen = [x for x in lines if x['benchmark'] == 'train_step' and x['platform'] == 'cpu']
    chosen = [x for x in chosen if (x['batch'], x['dtype']) == (8, 'float32') and 'settings' not in x]
    chosen.sort(key=lambda x: x.get('keep_memory', False))  # the last one counts: a step as train.py runs it
    speeds = {(x['model'], x['mode'], x['side']): x['images_per_s'] for x in chosen}
    groups: Groups = {}
    for model in sorted({model for model, _, _ in speeds}):
        for mode, label in MODES.items():
            values = {side: speeds[model, mode, side] for side in SIDES if (model, mode, side) in speeds}
            reference = values.get('torch-channels-last')
            if reference:
                bars = {side: (v / reference, f'{v / reference:.2f}') for side, v in values.items()}
                groups[f'{network_name(model)}\n{label}'] = bars
    return groups


def draw(axis: Any, groups: Groups, series: dict[str, tuple[str, str]]) -> None:
    """Draws horizontal bars, one group after the other from the top, with a legend of the series."""
    ticks, place = [], 0.0
    for bars in groups.values():
        ticks.append(place + (len(bars) - 1) / 2)
        for name, (value, text) in bars.items():
            axis.barh(place, value, 0.9, color=series[name][1], label=series[name][0])
            axis.text(value, place, f' {text}', va='center', fontsize=9)
            place += 1
        place += 0.8
    axis.set_yticks(ticks, list(groups))
    axis.invert_yaxis()
    longest = max(value + 0.05 * len(text) for bars in groups.values() for value, text in bars.values())
    axis.set_xlim(0, 1.1 * longest)
    axis.spines[['top', 'right']].set_visible(False)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # each series once
    place = {'loc': 'upper center', 'bbox_to_anchor': (0.4, -0.15), 'ncols': 3, 'frameon': False}
    axis.legend(handles.values(), handles.keys(), handlelength=1, columnspacing=1.2, fontsize=9, **place)


def network_name(model: str) -> str:
    """Returns the name of a network as the papers write it: 'EPSANet-50 Small'."""
    family, _, size = model.partition('_')
    depth = _depth(model)
    return f'{FAMILIES[family.removesuffix(str(depth))]}-{depth} {size.capitalize()}'.strip()


def _depth(model: str) -> int:
    return int(''.join(c for c in model if c.isdigit()))


def _depth_and_cost(cycles: dict[tuple[str, str], int]):
    return lambda model: (_depth(model), min(v for (name, _), v in cycles.items() if name == model))


if __name__ == '__main__':
    main()
