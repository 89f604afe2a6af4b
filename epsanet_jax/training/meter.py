"""The steps between two lines of metrics: their sums and their speed."""

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
from epsanet_jax.training.report import Report
from epsanet_jax.training.run import Run


class Meter:
    """Collects the sums of steps, which stay on the devices until a line is due.

    The first step, which waits for the compiler, and pauses count neither as time nor as steps. Steps run
    behind the host's back, at most two at a time; a thread notes when each is done, so that the time which
    the devices spend waiting for pictures is known without stopping them.

    Args:
        run: the run.
        report: where lines go.
        feed: where batches come from.
        sums: of the steps between the last line and the checkpoint that the run continues from.

    Attributes:
        sums: of the steps collected since the last line.
        requests: what the processes asked for in the step before the last, as all of them know after the
            last one; none right after a pause.
    """

    def __init__(self, run: Run, report: Report, feed: inputs.Feed, sums: dict[str, float]):
        self._run, self._report, self._feed = run, report, feed
        self._pending: list[tuple[int, metrics.Sums]] = []
        self.sums = dict(sums)
        self.requests: list[bool] = []
        self._last_requests: jax.Array | None = None
        self._bad: set[int] = set()
        self._watcher = futures.ThreadPoolExecutor(1)
        self._done: list[futures.Future[float]] = []  # when the last two steps were done
        self._waits: list[tuple[futures.Future[float], float, float]] = []
        self._timed_steps = 0
        self._began: float | None = None
        self._read_before = 0, 0.0
        self._created = time.perf_counter()

    def add(self, step: int, sums: metrics.Sums) -> None:
        """Takes the sums of a step; waits until no more than two are under way."""
        requests, self._last_requests = self._last_requests, sums['requests']
        self.requests = [] if requests is None else (jax.device_get(requests) > 0).tolist()
        self._pending.append((step, {k: v for k, v in sums.items() if k != 'requests'}))
        if self._began is None:
            jax.block_until_ready(sums)
            self._report.say(f'first step after {time.perf_counter() - self._created:.1f} s')
            self._restart_clock()
        else:
            self._timed_steps += 1
            if self._done:
                self._waits.append((self._done[-1], self._feed.asked, self._feed.got))
        self._done = [*self._done[-1:], self._watcher.submit(_when_done, sums)]
        self._done[0].result()

    def collect(self) -> None:
        """Waits for the steps so far.

        Raises:
            TrainingError: the loss of one of them is not finite.
        """
        for step, on_device in self._pending:
            sums = {k: v.item() for k, v in jax.device_get(on_device).items()}
            if not math.isfinite(sums['loss']):
                rate = self._run.learning_rate(step - 1)
                raise TrainingError(
                    f'the loss is {sums["loss"] / sums["count"]} at step {step} (learning rate {rate:.4g}); '
                    'lower config.optimizer.lr and start anew, or go on from an earlier checkpoint'
                )
            self.sums = {k: self.sums.get(k, 0.0) + v for k, v in sums.items()}
        self._pending.clear()

    def write(self, step: int) -> None:
        """Writes a line of metrics and begins anew."""
        self.collect()
        assert self._began is not None, 'a line without a step'
        seconds = time.perf_counter() - self._began
        speed: dict[str, float] = {}
        if self._timed_steps:
            seconds_per_step = seconds / self._timed_steps
            speed = {
                'images_per_s': self._run.config.batch_size / seconds_per_step,
                'data_wait': self._waited() / seconds,
                'pipeline_images_per_s': self._pipeline_rate(),
                'eta_s': (self._run.total_steps - step) * seconds_per_step,
            }
        self._report.train(
            step,
            metrics.averages(self.sums),
            lr=self._run.learning_rate(step - 1),
            **speed,
        )
        self.sums = {}
        self._restart_clock()
        self._tell_of_bad_pictures()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits for the steps so far and leaves out the time spent inside."""
        self.collect()
        began = time.perf_counter()
        yield
        self.requests, self._last_requests = [], None
        self._done.clear()  # the devices did not wait for pictures meanwhile
        if self._began is not None:
            self._began += time.perf_counter() - began

    def _restart_clock(self) -> None:
        self._began, self._timed_steps = time.perf_counter(), 0
        self._waits.clear()
        self._read_before = self._feed.pictures, self._feed.seconds

    def _pipeline_rate(self) -> float:
        """Returns the pictures per second of all processes, were the devices never to be waited for."""
        pictures = self._feed.pictures - self._read_before[0]
        seconds = self._feed.seconds - self._read_before[1]
        at_once = inputs.reading(self._run.config.data).at_once()
        return jax.process_count() * at_once * pictures / max(seconds, 1e-9)

    def _waited(self) -> float:
        """Returns the seconds in which a step was done and the next batch asked for, but not there."""
        return sum(max(0.0, got - max(done.result(), asked)) for done, asked, got in self._waits)

    def close(self) -> None:
        """Ends the thread."""
        self._watcher.shutdown(wait=False)

    def _tell_of_bad_pictures(self) -> None:
        new = [index for index in dict.fromkeys(self._feed.bad) if index not in self._bad]
        self._bad.update(new)
        self._feed.bad.clear()
        for index in new:
            message = pipeline.bad_image_message(self._run.train_source, index)
            self._report.warn(f'replaced by the next: {message} ({len(self._bad)} so far)')
        limit = self._run.config.data.max_bad_images
        if len(self._bad) > limit:
            raise BadImageError(
                f'{len(self._bad)} pictures cannot be decoded, more than config.data.max_bad_images={limit}'
            )


def _when_done(sums: metrics.Sums) -> float:
    jax.block_until_ready(sums)
    return time.perf_counter()
