"""The output of a run: metrics.jsonl, and lines or a progress bar on the console."""

import contextlib
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from epsanet_jax.errors import TrainingError, one_line
from epsanet_jax.paths import is_remote, replacing
from epsanet_jax.training.clock import Clock
from epsanet_jax.training.tensorboard import Events
from epsanet_jax.training.tracker import Tracker
from epsanet_jax.workdir import METRICS_FILE, evaluations, read_lines


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of a run since the last line of metrics.

    Attributes:
        images_per_s: images per second that all devices together trained on.
        data_wait: share of the time that the devices waited for images.
        pipeline_images_per_s: images per second that all processes together could read.
        eta_s: seconds to the end of the run.
    """

    images_per_s: float
    data_wait: float
    pipeline_images_per_s: float
    eta_s: float


def log(text: str) -> None:
    """Prints a line above the progress bar, in process 0 only."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Report:
    """Writes metrics and shows progress, in process 0 only.

    On a local disk each line is appended to metrics.jsonl. An object store cannot append: there the whole
    file is written at every evaluation and at the end.

    Args:
        workdir: folder of the run.
        step: step at which the run starts or continues. Lines of later steps, which run again, are removed.
        total: number of steps of the whole run.
        clock: measures the times of this process.
        tensorboard: whether to write events for TensorBoard too; only on a local disk.
        track: given the lines so far, returns a tracker that gets the lines of training and evaluation too.
    """

    def __init__(
        self,
        workdir: epath.Path,
        step: int,
        total: int,
        clock: Clock,
        tensorboard: bool = False,
        track: Callable[[list[dict[str, Any]]], Tracker] | None = None,
    ):
        self._path, self._total = workdir / METRICS_FILE, total
        self._active = jax.process_index() == 0
        self._local = not is_remote(workdir)
        # Times stay: those of later steps are lost, see `analysis.goodput`.
        lines = read_lines(workdir)
        self.lines = [line for line in lines if line['step'] <= step or line['split'] == 'time']
        self.clock = clock
        self.lines.append(self._time(step, began=round(clock.began, 3)))
        self._events = Events(workdir, step) if tensorboard and self._active and self._local else None
        if tensorboard and not self._local:
            log(f'no events for TensorBoard: {workdir} is not on a local disk')
        known = [line for line in self.lines if line['split'] != 'time']
        self._tracker = track(known) if track and self._active else None
        hide = not (self._active and sys.stderr.isatty())
        self._bar = tqdm(total=total, initial=step, unit='step', dynamic_ncols=True, disable=hide)
        self.flush()

    def warn(self, text: str) -> None:
        """Prints a line that only this process knows about, also in processes other than 0."""
        if jax.process_count() > 1:
            print(f'process {jax.process_index()}: {text}', file=sys.stderr, flush=True)
        else:
            log(text)

    def advance(self) -> None:
        """Advances the progress bar by a step."""
        self._bar.update()

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation at this step is recorded."""
        return any(line['step'] == step for line in evaluations(self.lines))

    def train(self, step: int, means: dict[str, float], lr: float, speed: Speed | None) -> None:
        """Records the means of the steps since the last line.

        Args:
            step: number of updates made.
            means: 'loss', 'top1', 'top5' (fractions).
            lr: learning rate of the last update.
            speed: None if no step was timed.
        """
        digits = {'images_per_s': 2, 'data_wait': 4, 'pipeline_images_per_s': 1}
        values = {k: means[k] for k in ('loss', 'top1', 'top5')}
        timing = {k: speed and round(getattr(speed, k), n) for k, n in digits.items()}
        self._write({'split': 'train', 'step': step, **values, 'lr': lr, **timing})
        result = f'loss {means["loss"]:.4f} | top-1 {means["top1"]:.1%} | lr {lr:.4g}'
        text = f'step {step}/{self._total} | {result}'
        if speed is not None:
            eta = datetime.timedelta(seconds=round(speed.eta_s))
            text += f' | {speed.images_per_s:.1f} images/s | data wait {speed.data_wait:.1%}'
            text += f' (pipeline {speed.pipeline_images_per_s:.0f}/s) | ETA {eta}'
        log(text)

    def evaluation(self, step: int, means: dict[str, float], seconds: float) -> None:
        """Records an evaluation: the values of `evaluation.evaluate`, and those of moving averages."""
        self._write({'split': 'eval', 'step': step, **means})
        self.flush()
        log(f'step {step}/{self._total} | {describe(means)} in {seconds:.1f} s')

    def time(self, step: int) -> None:
        """Records what the time since the last call was spent on, up to this step."""
        self._write(self._time(step))

    def _time(self, step: int, **more: float) -> dict[str, Any]:
        return {'split': 'time', 'step': step, 'at': round(time.time(), 3), **more, **self.clock.take()}

    def flush(self) -> None:
        """Writes the whole metrics.jsonl."""
        if self._active:
            with self._writing(), replacing(self._path) as temporary:
                temporary.write_text(''.join(json.dumps(line) + '\n' for line in self.lines))

    def before_checkpoint(self) -> None:
        """Writes metrics.jsonl in an object store: a run continues after the lines before its checkpoint."""
        if not self._local:
            self.flush()

    def close(self, step: int) -> None:
        """Ends the progress bar and writes what is left at this step, without an error if that fails."""
        self._bar.close()
        with contextlib.suppress(TrainingError):
            self.time(step)
            self.flush()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
        if self._tracker is not None:
            self._tracker.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise TrainingError(
                f'cannot write metrics to {self._path.parent}: {one_line(e)}; free disk space or fix '
                'permissions, then the same command continues at the last checkpoint'
            ) from e

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self._writing():
            if self._events is not None and line['split'] != 'time':
                self._events.write(line)
            if self._active and self._local:
                with self._path.open('a') as f:
                    f.write(json.dumps(line) + '\n')
        if self._tracker is not None and line['split'] != 'time':
            self._tracker.write(line)


def describe(means: dict[str, float]) -> str:
    """Returns an evaluation as text."""
    skipped = f', {means["skipped"]} skipped' if means.get('skipped') else ''
    classes = ''
    if 'mean_class_accuracy' in means:  # not in old workdirs
        classes = f' | mean per class {means["mean_class_accuracy"]:.2%}'
    averaged = f' | EMA top-1 {means["ema_top1"]:.2%}' if 'ema_top1' in means else ''
    return (
        f'evaluation: loss {means["loss"]:.4f} | top-1 {means["top1"]:.2%} | top-5 {means["top5"]:.2%} '
        f'of {means["examples"]} images{skipped}{classes}{averaged}'
    )
