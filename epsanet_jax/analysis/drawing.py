"""The drawings of `epsanet explain`."""

import math
import warnings
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from epsanet_jax.analysis.explain import Explanation
from epsanet_jax.paths import write_atomically

_TOP = 5  # number of classes in the list
_PANEL = 2.6  # width and height of an image, inches
_BARS_HEIGHT = 2.4  # height of the bars of the attention, inches
_LONGEST = 30  # longest name, characters
_COLOURS = ('#3b6fb6', '#52a675', '#e0a030', '#c8553d', '#8a5fa8', '#6b6b6b')
_MAP = 'inferno'


def draw(explanation: Explanation) -> Figure:
    """Draws the image, Grad-CAM (one row per class, one column per stage), the top classes and attention."""
    e = explanation
    rows = len(e.classes)
    heights = [rows * (_PANEL + 0.45) + 0.3, *([_BARS_HEIGHT] if e.attention else [])]
    width = max(_PANEL * (len(e.cams) + 1) + 0.9 + _PANEL, 9.0 if e.attention else 0.0)
    if e.attention:
        width = max(width, 0.28 * sum(map(len, e.attention.values())) + 2)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, sum(heights)), layout=layout, dpi=110)
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1 + bool(e.attention), 1, squeeze=False, height_ratios=heights)
    _draw_maps(parts[0, 0], e)
    if e.attention:
        _draw_attention(parts[1, 0], e.attention, e.kernels)
    return figure


def save(figure: Figure, path: str) -> None:
    """Writes a PNG file; InputError if that is not possible. An interruption leaves no partial file."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from')  # characters that the font lacks
        write_atomically(path, lambda temporary: figure.savefig(temporary, format='png'))


def _draw_maps(figure: SubFigure, e: Explanation) -> None:
    rows, columns = len(e.classes), len(e.cams)
    ratios = [1.0] * (columns + 1) + [0.95]
    grid: Any = figure.subplots(rows, columns + 2, squeeze=False, width_ratios=ratios)
    for axes in grid.flat:
        axes.set_axis_off()
    image = _displayed(e.image)
    grid[0, 0].imshow(image)
    style = {'fontsize': 9, 'parse_math': False}
    grid[0, 0].set_title(shorten(e.name, middle=True), **style)
    _draw_top_classes(grid[0, -1], e)
    gray = image.mean(axis=-1)
    for row, number in enumerate(e.classes):
        for column, (stage, cams) in enumerate(e.cams.items(), start=1):
            axes, cam = grid[row, column], cams[row]
            axes.imshow(gray, cmap='gray', vmin=0, vmax=255)
            note = '' if cam.max() > 0 else ' (all 0)'
            scaled = cam / (cam.max() or 1)
            axes.imshow(scaled, cmap=_MAP, vmin=0, vmax=1, alpha=0.25 + 0.5 * scaled)
            name, share = shorten(e.names[int(number)]), 100 * e.probabilities[number]
            axes.set_title(f'{name}, {share:.1f} %\nGrad-CAM at {stage}{note}', **style)
    mapping = ScalarMappable(Normalize(0, 1), _MAP)
    bar = figure.colorbar(mapping, ax=list(grid[0, 1:-1]), shrink=0.8, aspect=25, pad=0.02)
    bar.set_label('relative to the maximum of the map', fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _displayed(image: np.ndarray) -> np.ndarray:
    """Returns uint8 [H, W, 3]; other than three channels as their mean, from black to white."""
    if image.shape[-1] == 3:
        return image
    gray = image.mean(axis=-1, keepdims=True)
    low, high = gray.min(), gray.max()
    return np.uint8(255 * (gray - low) / (high - low or 1)).repeat(3, axis=-1)


def _draw_top_classes(axes: Any, e: Explanation) -> None:
    axes.set_axis_on()
    order = np.argsort(-e.probabilities, kind='stable')[:_TOP]
    places = np.arange(len(order))
    axes.barh(places, e.probabilities[order], height=0.3, color='#b9c6d8')
    for place, number in zip(places, order, strict=True):
        share = f'{100 * e.probabilities[number]:.1f} %'
        bold = 'bold' if number in e.classes else 'normal'
        style = {'va': 'bottom', 'fontsize': 8, 'weight': bold, 'parse_math': False}
        axes.text(0, place - 0.2, shorten(e.names[int(number)], 26), **style)
        axes.text(1, place - 0.2, share, ha='right', **style)
    axes.set(xlim=(0, 1), ylim=(_TOP - 0.4, -0.75), yticks=[])
    axes.set_title('top classes', fontsize=9)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(labelsize=8)
    axes.spines[['top', 'right', 'left']].set_visible(False)


def _draw_attention(
    figure: SubFigure, attention: dict[str, np.ndarray], kernels: dict[str, list[str]]
) -> None:
    """Draws bars that start at the equal share, because all values are close to it."""
    known = dict.fromkeys(label for labels in kernels.values() for label in labels)
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(known)}
    shares = {stage: 1 / len(labels) for stage, labels in kernels.items()}
    widths = [max(2, len(rows)) for rows in attention.values()]
    grid: Any = figure.subplots(1, len(widths), squeeze=False, sharey=True, width_ratios=widths)
    for axes, (stage, rows) in zip(grid[0], attention.items(), strict=True):
        equal, branches = shares[stage], len(kernels[stage])
        for branch, label in enumerate(kernels[stage]):
            places = np.arange(len(rows)) + (branch - (branches - 1) / 2) * 0.8 / branches
            heights = rows[:, branch] - equal
            axes.bar(places, heights, 0.8 / branches, bottom=equal, color=colours[label])
        axes.axhline(equal, color='black', linewidth=0.8)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(f'{stage}, block', fontsize=9)
        axes.set_xticks(range(0, len(rows), 1 if len(rows) < 8 else 2))
        axes.tick_params(labelsize=8)
        axes.spines[['top', 'right']].set_visible(False)
    largest = max(float(np.abs(rows - shares[stage]).max()) for stage, rows in attention.items())
    reach = max(0.02, 1.1 * largest)
    grid[0, 0].set_ylim(max(0.0, min(shares.values()) - reach), max(shares.values()) + reach)
    grid[0, 0].set_ylabel('mean attention', fontsize=9)
    line = ', '.join(dict.fromkeys(f'{share:.3g}' for share in shares.values()))
    figure.legend(
        [Patch(color=colour) for colour in colours.values()],
        [f'kernel {label}' for label in colours],
        loc='outside upper center',
        ncols=len(colours),
        fontsize=8,
        frameon=False,
        title=f'attention of the pyramids, mean over channels; line: equal share, {line}',
        title_fontsize=9,
    )


def shorten(text: str, longest: int = _LONGEST, middle: bool = False) -> str:
    """Returns a name on one line, without its end or its middle if it is too long."""
    text = text if text.isprintable() else repr(text)
    if len(text) <= longest:
        return text
    head = math.ceil((longest - 1) / 2) if middle else longest - 1
    return f'{text[:head]}…{text[len(text) - (longest - 1 - head) :]}'
