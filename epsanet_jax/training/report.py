"""What a run tells: metrics.jsonl, and lines or a progress bar on the console."""

import contextlib
import datetime
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from epsanet_jax.errors import TrainingError, one_line
from epsanet_jax.paths import is_remote, replacing
from epsanet_jax.training.tensorboard import Events
from epsanet_jax.workdir import METRICS_FILE, read_metrics


def say(text: str) -> None:
    """Prints a line above a progress bar; only process 0 does."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Report:
    """Writes metrics and tells of progress; only process 0 does.

    metrics.jsonl is appended to on a local disk. An object store knows no append: there the whole file is
    written at every evaluation and at the end.

    Args:
        workdir: of the run.
        step: at which the run starts or continues; lines of later steps, of which no checkpoint was left,
            are removed, since those steps are about to be made again.
        total: steps of the whole run.
        tensorboard: whether to write events for TensorBoard too; only on a local disk.
    """

    def __init__(self, workdir: epath.Path, step: int, total: int, tensorboard: bool = False):
        self._path, self._total = workdir / METRICS_FILE, total
        self._active = jax.process_index() == 0
        self._local = not is_remote(workdir)
        self.lines = [line for line in read_metrics(workdir) if line['step'] <= step]
        self._events = Events(workdir, step) if tensorboard and self._active and self._local else None
        if tensorboard and not self._local:
            say(f'no events for TensorBoard: {workdir} is not on a local disk')
        hide = not (self._active and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=step, unit='step', dynamic_ncols=True, disable=hide)
        self.flush()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        say(text)

    def warn(self, text: str) -> None:
        """Prints a line of what only this process knows, whichever it is."""
        if jax.process_count() > 1:
            print(f'process {jax.process_index()}: {text}', file=sys.stderr, flush=True)
        else:
            say(text)

    def advance(self) -> None:
        """Moves the progress bar on by a step."""
        self._bar.update()

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation at this step is recorded."""
        return any(line['split'] == 'eval' and line['step'] == step for line in self.lines)

    def train(
        self,
        step: int,
        means: dict[str, float],
        lr: float,
        images_per_s: float | None = None,
        data_wait: float | None = None,
        pipeline_images_per_s: float | None = None,
        eta_s: float | None = None,
    ) -> None:
        """Records the means since the last line, the current learning rate and, where known, the speed.

        Args:
            step: updates made.
            means: 'loss', 'top1', 'top5' (fractions).
            lr: of the last update.
            images_per_s: of all devices together.
            data_wait: share of the time that the devices waited for pictures.
            pipeline_images_per_s: which the pipeline could read, of all processes together.
            eta_s: seconds to the end.
        """
        values = {k: means[k] for k in ('loss', 'top1', 'top5')}
        speed = {
            'images_per_s': _rounded(images_per_s, 2),
            'data_wait': _rounded(data_wait, 4),
            'pipeline_images_per_s': _rounded(pipeline_images_per_s, 1),
        }
        self._write({'split': 'train', 'step': step, **values, 'lr': lr, **speed})
        text = (
            f'step {step}/{self._total} | loss {means["loss"]:.4f} | top-1 {means["top1"]:.1%} | lr {lr:.4g}'
        )
        if images_per_s is not None:
            text += f' | {images_per_s:.1f} images/s | data wait {data_wait:.1%}'
            text += f' (pipeline {pipeline_images_per_s:.0f}/s) | ETA {_duration(eta_s)}'
        self.say(text)

    def evaluation(self, step: int, means: dict[str, float], seconds: float) -> None:
        """Records an evaluation: 'loss', 'top1', 'top5', 'examples', and what more there is."""
        self._write({'split': 'eval', 'step': step, **means})
        self.flush()
        self.say(f'step {step}/{self._total} | {describe(means)} in {seconds:.1f} s')

    def flush(self) -> None:
        """Writes metrics.jsonl whole."""
        if self._active:
            with self._writing(), replacing(self._path) as temporary:
                temporary.write_text(''.join(json.dumps(line) + '\n' for line in self.lines))

    def before_checkpoint(self) -> None:
        """Writes metrics.jsonl where lines are not appended: a run goes on after those of its checkpoint."""
        if not self._local:
            self.flush()

    def close(self) -> None:
        """Ends the progress bar and writes what is left, if it can; `flush` says that it cannot."""
        self._bar.close()
        with contextlib.suppress(TrainingError):
            self.flush()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise TrainingError(
                f'cannot write metrics to {self._path.parent}: {one_line(e)}; make room or give permission: '
                'the same command continues at the last checkpoint'
            ) from e

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self._writing():
            if self._events is not None:
                self._events.write(line)
            if self._active and self._local:
                with self._path.open('a') as f:
                    f.write(json.dumps(line) + '\n')


def describe(means: dict[str, float]) -> str:
    """Returns an evaluation in words."""
    skipped = f', {means["skipped"]} skipped' if means.get('skipped') else ''
    averaged = f' | EMA top-1 {means["ema_top1"]:.2%}' if 'ema_top1' in means else ''
    return (
        f'evaluation: loss {means["loss"]:.4f} | top-1 {means["top1"]:.2%} | top-5 {means["top5"]:.2%} '
        f'of {means["examples"]} pictures{skipped}{averaged}'
    )


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _duration(seconds: float | None) -> str:
    return '?' if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
