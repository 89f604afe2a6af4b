"""Curves of one or several runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from epsanet_jax.analysis import goodput
from epsanet_jax.analysis.drawing import shorten
from epsanet_jax.errors import InputError
from epsanet_jax.paths import resolve, write_atomically
from epsanet_jax.workdir import METRICS_FILE, best_by, read_lines, read_metrics

SUFFIXES = ('.png', '.svg', '.pdf')
# Okabe and Ito's colours, which people with colour blindness can distinguish.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')


def plot(workdirs: Sequence[str], out: str) -> list[str]:
    """Draws loss, top-1 accuracy and learning rate of runs over their steps.

    Args:
        workdirs: folders with a metrics.jsonl.
        out: file to write, .png, .svg or .pdf; an existing file is replaced.

    Returns:
        A line about each run, and one about where its wall time went.

    Raises:
        InputError: a folder holds no metrics, or `out` cannot be written.
    """
    if not out.lower().endswith(SUFFIXES):
        raise InputError(f'--out must end with {", ".join(SUFFIXES)}, got {out}')
    runs = {_name(workdir, workdirs): _read(workdir) for workdir in workdirs}
    figure = draw(runs)
    kind = Path(out).suffix[1:].lower()
    with matplotlib.rc_context({'svg.fonttype': 'none'}):  # text instead of outlines
        write_atomically(out, lambda temporary: figure.savefig(temporary, dpi=130, format=kind))
    times = {_name(workdir, workdirs): goodput.goodput(read_lines(resolve(workdir))) for workdir in workdirs}
    return [
        *(f'{name}: {_summary(lines)}' for name, lines in runs.items()),
        *(f'{name}: wall time {goodput.describe(spent)}' for name, spent in times.items() if spent),
    ]


def draw(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draws runs, name -> lines of metrics.jsonl, in three panels."""
    names = [shorten(name, 100, middle=True) for name in runs]
    columns = max(1, min(len(names), 150 // (max(map(len, names)) + 8)))  # as many as fit in the width
    figure = Figure(figsize=(13, 4.2 + 0.2 * math.ceil(len(names) / columns)))
    figure.set_layout_engine('constrained', w_pad=0.12)
    panels = loss, top1, lr = figure.subplots(1, 3)
    handles = []
    for number, lines in enumerate(runs.values()):
        colour = _COLOURS[number % len(_COLOURS)]
        handles.append(Line2D([], [], color=colour, marker='o', markersize=3))
        for axes, field in ((loss, 'loss'), (top1, 'top1')):
            _curve(axes, lines, 'train', field, color=colour, alpha=0.45, linewidth=1)
            _curve(axes, lines, 'eval', field, color=colour, marker='o', markersize=3)
        _curve(top1, lines, 'eval', 'ema_top1', color=colour, linestyle='--', marker='s', markersize=3)
        _curve(lr, lines, 'train', 'lr', color=colour)
    averaged = any('ema_top1' in line for lines in runs.values() for line in lines)
    loss.set_title('loss (thin: training)', fontsize=10)
    top1.set_title(f'top-1 (thin: training{", dashed: moving averages" if averaged else ""})', fontsize=10)
    lr.set_title('learning rate', fontsize=10)
    top1.set_ylim(0, 1)
    top1.yaxis.set_major_formatter(PercentFormatter(1.0))
    lr.set_ylim(bottom=0)
    for axes in panels:
        axes.set_xlabel('step')
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    legend = figure.legend(
        handles, [''] * len(names), loc='outside lower center', ncols=columns, frameon=False
    )
    for label, name in zip(legend.get_texts(), names, strict=True):
        label.set(text=name, parse_math=False)
    return figure


def _curve(axes: Axes, lines: list[dict[str, Any]], split: str, field: str, **style: Any) -> None:
    chosen = [line for line in lines if line['split'] == split and isinstance(line.get(field), int | float)]
    axes.plot([line['step'] for line in chosen], [line[field] for line in chosen], **style)


def _read(workdir: str) -> list[dict[str, Any]]:
    folder = resolve(workdir)
    lines = read_metrics(folder) if folder.is_dir() else []
    if not lines:
        raise InputError(f'{workdir} holds no {METRICS_FILE} with metrics of a run')
    return lines


def _name(workdir: str, workdirs: Sequence[str]) -> str:
    """Returns the name of the folder, or the whole path if another folder has the same name."""
    names = [epath.Path(w.rstrip('/')).name for w in workdirs]
    name = names[workdirs.index(workdir)]
    return name if names.count(name) == 1 else workdir


def _summary(lines: list[dict[str, Any]]) -> str:
    evaluations = [
        line for line in lines if line['split'] == 'eval' and isinstance(line.get('top1'), int | float)
    ]
    if not evaluations:
        return f'step {lines[-1]["step"]}, not evaluated yet'
    best = max(evaluations, key=lambda line: (best_by(line), line['step']))
    last = evaluations[-1]
    return f'step {last["step"]}, top-1 {best_by(last):.2%}, best {best_by(best):.2%} at step {best["step"]}'
