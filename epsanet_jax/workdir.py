"""The names of the files in a workdir, and how to read its metrics."""

import json
from typing import Any

from etils import epath

CONFIG_FILE = 'config.json'
METRICS_FILE = 'metrics.jsonl'
CHECKPOINTS = 'checkpoints'
DAMAGED_CHECKPOINTS = 'checkpoints-damaged'
LOCK_FILE = 'lock.json'
TENSORBOARD = 'tensorboard'
TRACKER_FILE = 'tracker.json'
PROFILE = 'profile'


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of training and evaluation in metrics.jsonl, see `read_lines`."""
    return [line for line in read_lines(workdir) if line['split'] != 'time']


def read_lines(workdir: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without lines that are damaged or of other programs.

    The split of a line is 'train', 'eval' or 'time'; `analysis.goodput` adds up the times.
    """
    path = workdir / METRICS_FILE
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            continue
        if isinstance(content, dict) and _is_ours(content):
            lines.append(content)
    return lines


def _is_ours(line: dict[str, Any]) -> bool:
    numbers = (v for k, v in line.items() if k != 'split' and v is not None)
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
        return False
    if line.get('split') == 'time' and not isinstance(line.get('at'), int | float):
        return False
    return line.get('split') in ('train', 'eval', 'time') and isinstance(line.get('step'), int)


def evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the complete evaluations among lines of metrics."""
    needed = ('loss', 'top1', 'top5', 'examples')
    return [line for line in lines if line['split'] == 'eval' and None not in map(line.get, needed)]


def best_by(metrics: dict[str, float]) -> float:
    """Returns the value that the best checkpoint maximizes: top-1, of the moving averages if available.

    A checkpoint without an evaluation has the value -1.
    """
    values = (metrics.get(name) for name in ('ema_top1', 'top1'))
    return next((value for value in values if value is not None), -1.0)
