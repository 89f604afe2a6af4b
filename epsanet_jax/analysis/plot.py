"""Curves of one or several runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epsanet_jax.errors import InputError
from epsanet_jax.paths import resolve, write_atomically
from epsanet_jax.workdir import METRICS_FILE, best_by, read_metrics

SUFFIXES = ('.png', '.svg', '.pdf')
# Okabe and Ito's colours, which people with colour blindness tell apart too.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')


def plot(workdirs: Sequence[str], out: str) -> list[str]:
    """Draws loss, accuracy, learning rate and images per second of runs over their steps.

    Args:
        workdirs: folders with a metrics.jsonl.
        out: file to write, .png, .svg or .pdf; an older one is replaced.

    Returns:
        A line about each run.

    Raises:
        InputError: a folder holds no metrics, or `out` cannot be written.
    """
    if not out.lower().endswith(SUFFIXES):
        raise InputError(f'--out must end with {", ".join(SUFFIXES)}, got {out}')
    runs = {_name(workdir, workdirs): _read(workdir) for workdir in workdirs}
    figure = draw(runs)
    kind = Path(out).suffix[1:].lower()
    with matplotlib.rc_context({'svg.fonttype': 'none'}):  # text, not its outlines
        write_atomically(out, lambda temporary: figure.savefig(temporary, dpi=130, format=kind))
    return [f'{name}: {_summary(lines)}' for name, lines in runs.items()]


def draw(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draws runs, name -> lines of metrics.jsonl, in four panels."""
    figure = Figure(figsize=(11, 7), layout='constrained')
    (loss, top1), (rate, speed) = figure.subplots(2, 2)
    for number, (name, lines) in enumerate(runs.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        _curve(loss, lines, 'train', 'loss', color=colour, alpha=0.45, linewidth=1)
        _curve(loss, lines, 'eval', 'loss', color=colour, marker='o', markersize=3, label=name)
        _curve(top1, lines, 'train', 'top1', color=colour, alpha=0.45, linewidth=1)
        _curve(top1, lines, 'eval', 'top1', color=colour, marker='o', markersize=3, label=name)
        _curve(top1, lines, 'eval', 'ema_top1', color=colour, linestyle='--', marker='s', markersize=3)
        _curve(rate, lines, 'train', 'lr', color=colour, label=name)
        _curve(speed, lines, 'train', 'images_per_s', color=colour, label=name)
    loss.set(title='Loss (thin: training)', xlabel='step')
    averaged = any('ema_top1' in line for lines in runs.values() for line in lines)
    shown = 'thin: training, dashed: moving average' if averaged else 'thin: training'
    top1.set(title=f'Top-1 ({shown})', xlabel='step', ylim=(0, 1))
    top1.yaxis.set_major_formatter(lambda value, _: f'{value:.0%}')
    rate.set(title='Learning rate', xlabel='step')
    speed.set(title='Images / s', xlabel='step')
    for axes in (rate, speed):
        axes.set_ylim(bottom=0)
    for axes in (loss, top1, rate, speed):
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
    named: dict[str, Any] = {}  # a run may have no points in one of the panels
    for axes in (loss, rate, speed):
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(named.values(), named.keys(), loc='outside lower center', ncols=4, frameon=False)
    return figure


def _curve(axes: Axes, lines: list[dict[str, Any]], split: str, field: str, **style: Any) -> None:
    points = [
        (line['step'], line[field]) for line in lines if line['split'] == split and _number(line.get(field))
    ]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _read(workdir: str) -> list[dict[str, Any]]:
    folder = resolve(workdir)
    lines = read_metrics(folder) if folder.is_dir() else []
    if not lines:
        raise InputError(f'{workdir} holds no {METRICS_FILE} with metrics of a run')
    return lines


def _name(workdir: str, workdirs: Sequence[str]) -> str:
    """Returns the folder's name, or the whole path if another one is called so too."""
    names = [epath.Path(w.rstrip('/')).name for w in workdirs]
    name = epath.Path(workdir.rstrip('/')).name
    return name if names.count(name) == 1 else workdir


def _summary(lines: list[dict[str, Any]]) -> str:
    evaluations = [line for line in lines if line['split'] == 'eval' and _number(line.get('top1'))]
    if not evaluations:
        return f'step {lines[-1]["step"]}, not evaluated yet'
    best = max(evaluations, key=lambda line: (best_by(line), line['step']))
    last = evaluations[-1]
    return f'step {last["step"]}, top-1 {best_by(last):.2%}, best {best_by(best):.2%} at step {best["step"]}'
