"""How a run ended."""

import dataclasses
import datetime
import shlex
from typing import Any

from epsanet_jax.analysis import goodput
from epsanet_jax.training.report import describe
from epsanet_jax.training.run import Run
from epsanet_jax.workdir import CHECKPOINTS, best_by, evaluations, read_lines


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: number of updates made.
        last: the last evaluation, a line of metrics.jsonl.
        best: the evaluation with the highest top-1 (of the moving averages if the run keeps them; the latest
            if several are equal), a line of metrics.jsonl.
        workdir: folder of the run.
        seconds: time of all training steps, without compilation and pauses; None if metrics.jsonl has none.
        images_per_s: images per second during that time.
        goodput: where the wall time went, see `analysis.goodput`; empty for a run of an older version.
    """

    step: int
    last: dict[str, Any]
    best: dict[str, Any]
    workdir: str
    seconds: float | None
    images_per_s: float | None
    goodput: dict[str, float]

    def __str__(self) -> str:
        best, workdir, time = self.best['step'], shlex.quote(self.workdir), []
        if self.seconds is not None:
            duration = datetime.timedelta(seconds=round(self.seconds))
            time = [f'time: {duration} of training steps, {self.images_per_s:.1f} images/s']
        if self.goodput:
            time.append(f'wall time: {goodput.describe(self.goodput)}')
        lines = [
            f'finished at step {self.step}, {describe(self.last)}',
            f'best: top-1 {best_by(self.best):.2%} at step {best} ({self.workdir}/{CHECKPOINTS}/{best})',
            *time,
            f'workdir: {self.workdir} (config.json, metrics.jsonl, checkpoints/)',
            f'evaluate it: epsanet evaluate {workdir} --step best',
            f'see the curves: epsanet plot {workdir}',
        ]
        return '\n'.join(lines)


def make_result(run: Run, step: int, workdir: str) -> Result:
    """Returns how a run ended, read from metrics.jsonl; for a finished run the result is always the same."""
    lines = read_lines(run.workdir)
    evaluated = evaluations(lines)
    best = max(evaluated, key=lambda line: (best_by(line), line['step']))
    seconds, images = 0.0, 0
    before = 0 if run.start is None else run.start.step(run.steps_per_epoch)
    for line in (line for line in lines if line['split'] == 'train'):
        if line.get('images_per_s'):
            new = (line['step'] - before) * run.config.batch_size
            images, seconds = images + new, seconds + new / line['images_per_s']
        before = line['step']
    speed = images / seconds if seconds else None
    times = goodput.goodput(lines)
    return Result(step, evaluated[-1], best, workdir, seconds or None, speed, times)
