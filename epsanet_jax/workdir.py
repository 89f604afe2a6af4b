"""The files of a run's workdir, as everything that reads or writes them needs to know them."""

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
    """Returns the lines of metrics.jsonl, without those that are damaged or were cut off by a crash."""
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
    """Returns what makes an evaluation the best: top-1, of the moving averages if a run keeps them.

    A checkpoint between two evaluations has no metrics and counts as -1.
    """
    return metrics.get('ema_top1', metrics.get('top1', -1.0))
