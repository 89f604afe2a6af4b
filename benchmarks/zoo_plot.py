"""Draws the ratios that `zoo_convs.py` measured, as horizontal bars grouped by network."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

PANELS = {'torch': "PyTorch's time / ours", 'stock': "time of XLA's own / ours"}
DIRECTIONS = {'forward': ('forward', 'C0'), 'forward_backward': ('forward and both gradients', 'C1')}
HEIGHT = 0.4  # of a bar


def draw(records: list[dict[str, Any]], image: Path) -> None:
    """Writes an image with one panel for PyTorch and, if it was measured, one for XLA's own lowering."""
    panels = [p for p in PANELS if any(f'{p}_forward' in record['ratios'] for record in records)]
    places, ticks, titles = _places(records)
    last = max(places.values())
    size = 2.5 + 4.2 * len(panels), 1.2 + 0.3 * last
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout='constrained'
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for i, (direction, (label, color)) in enumerate(DIRECTIONS.items()):
            for record in records:
                ratio = record['ratios'].get(f'{panel}_{direction}')
                if ratio:
                    place = places[record['name']] + (i - 0.5) * HEIGHT
                    axis.barh(place, ratio - 1, HEIGHT, left=1, color=color, label=label)
                    axis.text(max(ratio, 1), place, f' {ratio:.3g}', va='center', fontsize=7)
        axis.set_xscale('log')
        axis.axvline(1, color='black', linewidth=0.8)
        axis.set_xlabel(f'{PANELS[panel]} (right of 1: ours is faster)')
        axis.spines[['top', 'right']].set_visible(False)
        axis.margins(x=0.15)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter('{x:g}')
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0][0].set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    for place, title in titles.items():
        axes[0][0].text(
            -0.02, place, title, transform=axes[0][0].get_yaxis_transform(), ha='right', weight='bold'
        )
    axes[0][0].set_ylim(last + 1, -1)
    handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))  # each direction once
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=2, frameon=False)
    first = records[0]
    figure.suptitle(f'{first["device"]}, {first["dtype"]}, batch {first["batch"]}', fontsize=10)
    figure.savefig(image, dpi=100)
    plt.close(figure)


def _places(records: list[dict[str, Any]]) -> tuple[dict[str, float], dict[float, str], dict[float, str]]:
    """Returns each convolution's place by its name, and by place the labels and the titles of networks."""
    places, ticks, titles = {}, {}, {}
    place, network = -1.5, None
    for record in records:
        if record['network'] != network:
            network = record['network']
            place += 0.5
            titles[place + 1] = network
            place += 1
        place += 1
        places[record['name']], ticks[place] = place, _label(record)
    return places, ticks, titles


def _label(record: dict[str, Any]) -> str:
    k, groups = record['kernel'], record['groups']
    kind = 'depthwise' if groups == record['inputs'] else f'{groups} groups'
    stride = f', stride {record["stride"]}' if record['stride'] > 1 else ''
    dilation = f', dilation {record["dilation"]}' if record['dilation'] > 1 else ''
    channels = f'{record["inputs"]}' + (
        f'→{record["outputs"]}' if record['outputs'] != record['inputs'] else ''
    )
    return f'{k}x{k}, {kind}{stride}{dilation}, {record["size"]}x{record["size"]}x{channels}'
