"""Sums and speed of the steps between two lines of metrics."""

import contextlib
import math
import time
from collections.abc import Iterator
from concurrent import futures

import jax

from epsanet_jax.data import pipeline
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.errors import TrainingError
from epsanet_jax.training import inputs, metrics
from epsanet_jax.training.report import Report, Speed, log
from epsanet_jax.training.run import Run


class Meter:
    """Collects the sums of steps, which stay on the devices until a line is due.

    The measured time contains neither the first step nor pauses. Steps run asynchronously, at most two at a
    time. A thread records when each one ends: this measures how long the devices wait for images, without
    stopping them. `sums` are those of the steps between the last line and the checkpoint that the run
    continues from.

    Attributes:
        sums: sums of the steps collected since the last line.
        requests: requests of the step before the last, equal in all processes; empty right after a pause.
    """

    def __init__(self, run: Run, report: Report, feed: inputs.Feed, sums: dict[str, float]):
        self._run, self._report, self._feed = run, report, feed
        self._pending: list[tuple[int, metrics.Sums]] = []
        self.sums = dict(sums)
        self.requests: list[bool] = []
        self._last_requests: jax.Array | None = None
        self._bad: set[int] = set()
        self._watcher = futures.ThreadPoolExecutor(1)
        self._done: list[futures.Future[float]] = []  # end times of the last two steps
        self._waits: list[tuple[futures.Future[float], float, float]] = []
        self._timed_steps = 0
        self._began: float | None = None
        self._read_before = 0, 0.0
        self._recorded = 0.0  # seconds of waiting since the last line that the clock knows
        self._created = time.perf_counter()

    def add(self, step: int, sums: metrics.Sums) -> None:
        """Adds the sums of a step; waits until at most one step before it is running."""
        requests, self._last_requests = self._last_requests, sums['requests']
        self.requests = [] if requests is None else (jax.device_get(requests) > 0).tolist()
        self._pending.append((step, {k: v for k, v in sums.items() if k != 'requests'}))
        if self._began is None:
            jax.block_until_ready(sums)
            self._report.clock.waited(self._feed.got - self._feed.asked)
            log(f'first step after {time.perf_counter() - self._created:.1f} s')
            self._restart_clock()
        else:
            self._timed_steps += 1
            if self._done:
                self._waits.append((self._done[-1], self._feed.asked, self._feed.got))
        self._done = [*self._done[-1:], self._watcher.submit(_when_done, sums)]
        self._done[0].result()

    def collect(self) -> None:
        """Waits for the steps so far; raises TrainingError if the loss of one is not finite."""
        for step, on_device in self._pending:
            sums = {k: v.item() for k, v in jax.device_get(on_device).items()}
            if not math.isfinite(sums['loss']):
                lr = self._run.learning_rate(step - 1)
                raise TrainingError(
                    f'the loss is {sums["loss"] / sums["count"]} at step {step} (learning rate {lr:.4g}); '
                    'lower config.optimizer.lr and start again, or continue from an earlier checkpoint'
                )
            self.sums = {k: self.sums.get(k, 0.0) + v for k, v in sums.items()}
        self._pending.clear()

    def write(self, step: int) -> None:
        """Writes a line of metrics and starts the next one."""
        self.collect()
        assert self._began is not None, 'a line without a step'
        seconds = time.perf_counter() - self._began
        waited = self._record_waiting()
        speed: Speed | None = None
        if self._timed_steps:
            speed = Speed(
                images_per_s=self._run.config.batch_size * self._timed_steps / seconds,
                data_wait=waited / seconds,
                pipeline_images_per_s=self._pipeline_speed(),
                eta_s=(self._run.total_steps - step) * seconds / self._timed_steps,
            )
        lr = self._run.learning_rate(step - 1)
        self._report.train(step, metrics.averages(self.sums), lr, speed)
        self._report.time(step)
        self.sums = {}
        self._restart_clock()
        self._warn_of_bad_images()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for the steps so far; the time inside the context is not measured."""
        self.collect()
        self._record_waiting()
        began = time.perf_counter()
        yield
        self.requests, self._last_requests = [], None
        self._done.clear()  # the devices did not wait for images during the pause
        if self._began is not None:
            self._began += time.perf_counter() - began

    def _restart_clock(self) -> None:
        self._began, self._timed_steps = time.perf_counter(), 0
        self._waits.clear()
        self._recorded = 0.0
        self._read_before = self._feed.images, self._feed.seconds

    def _pipeline_speed(self) -> float:
        """Returns the images per second that all processes could read if they never waited for devices."""
        images = self._feed.images - self._read_before[0]
        seconds = self._feed.seconds - self._read_before[1]
        at_once = inputs.reading(self._run.config.data).at_once()
        return jax.process_count() * at_once * images / max(seconds, 1e-9)

    def _record_waiting(self) -> float:
        """Returns the seconds in which the devices were idle because the next batch was missing."""
        waited = sum(max(0.0, got - max(done.result(), asked)) for done, asked, got in self._waits)
        self._report.clock.waited(waited - self._recorded)
        self._recorded = waited
        return waited

    def close(self) -> None:
        """Ends the thread."""
        self._watcher.shutdown(wait=False)

    def _warn_of_bad_images(self) -> None:
        new = [index for index in dict.fromkeys(self._feed.bad) if index not in self._bad]
        self._bad.update(new)
        self._feed.bad.clear()
        for index in new:
            channels = self._run.model.in_channels
            message = pipeline.bad_image_message(self._run.train_source, index, channels)
            self._report.warn(f'replaced by the next image: {message} ({len(self._bad)} so far)')
        limit = self._run.config.data.max_bad_images
        if len(self._bad) > limit:
            raise BadImageError(
                f'{len(self._bad)} images cannot be decoded, more than config.data.max_bad_images={limit}'
            )


def _when_done(sums: metrics.Sums) -> float:
    jax.block_until_ready(sums)
    return time.perf_counter()
