"""The names of the files in a workdir, and how to read its metrics."""

import json
from typing import Any

from etils import epath

CONFIG_FILE = 'config.json'
METRICS_FILE = 'metrics.jsonl'
CHECKPOINTS = 'checkpoints'
DAMAGED_CHECKPOINTS = 'checkpoints-damaged'
TENSORBOARD = 'tensorboard'
PROFILE = 'profile'


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without damaged or truncated ones."""
    path = workdir / METRICS_FILE
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            content = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(content, dict) and 'step' in content and 'split' in content:
            lines.append(content)
    return lines


def best_by(metrics: dict[str, float]) -> float:
    """Returns the value that the best checkpoint maximizes: top-1, of the moving averages if available.

    A checkpoint without an evaluation has the value -1.
    """
    return metrics.get('ema_top1', metrics.get('top1', -1.0))
