"""Where the wall time of a run went, also over restarts."""

import datetime
from collections.abc import Sequence
from typing import Any

# What the time is spent on, in the order of the report.
LABELS = {
    'steps': 'steps',
    'waiting': 'waiting for data',
    'compiling': 'compiling',
    'starting': 'starting',
    'evaluation': 'evaluation',
    'saving': 'saving',
    'lost': 'lost to interruptions',
}
_REPEATED = ('steps', 'waiting', 'evaluation', 'saving')


def goodput(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Adds up the times of a run.

    Args:
        lines: the lines of metrics.jsonl, in order; those with the split 'time' count.

    Returns:
        Seconds for each name in `LABELS`; 'lost' is the time of steps, evaluations and saves after the
        checkpoint from which the run was continued, which ran again. 'stopped' is the time between the last
        line of a process and the start of the next one. Empty if the lines hold no times.
    """
    entries: list[tuple[int, str, float]] = []
    stopped, last = 0.0, None
    for line in lines:
        if line['split'] != 'time':
            continue
        step = line['step']
        if 'began' in line:  # the first line of a process, which continues at this step
            entries = [(s, 'lost' if s > step and k in _REPEATED else k, t) for s, k, t in entries]
            if last is not None:
                stopped += max(0.0, line['began'] - last)
        last = line['at']
        entries += [(step, name, line[name]) for name in LABELS if name in line]
    if last is None:
        return {}
    sums = dict.fromkeys(LABELS, 0.0)
    for _, name, seconds in entries:
        sums[name] += seconds
    return {**sums, 'stopped': stopped}


def describe(seconds: dict[str, float]) -> str:
    """Returns the result of `goodput` as text, with shares of the time that the run was running."""
    running = sum(seconds[name] for name in LABELS)
    shares = {label: seconds[name] / max(running, 1e-9) for name, label in LABELS.items()}
    listed = ', '.join(f'{label} {share:.1%}' for label, share in shares.items() if share >= 0.0005)
    stopped = f'; not running: {_duration(seconds["stopped"])}' if seconds['stopped'] >= 0.5 else ''
    return f'{_duration(running)}: {listed}{stopped}'


def _duration(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=round(seconds))
