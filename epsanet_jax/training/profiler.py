"""A trace of some steps, for TensorBoard (plugin `tensorboard-plugin-profile`) or Perfetto."""

from typing import Any

import jax
from etils import epath

from epsanet_jax.errors import one_line
from epsanet_jax.training.config import ProfileConfig
from epsanet_jax.training.report import log
from epsanet_jax.workdir import PROFILE


class Profiler:
    """Traces `config.steps` steps after the first `config.start`, in process 0 only.

    Traces are in the folder 'profile' of the workdir, which must be on a local disk. The run starts or
    continues at `step`.
    """

    def __init__(self, config: ProfileConfig, workdir: epath.Path, step: int):
        self._config, self._folder = config, workdir / PROFILE
        self._wanted = config.steps > 0 and jax.process_index() == 0
        self._active = False
        if self._wanted and step > config.start:
            log(f'no profile: the run continues at step {step}, after config.profile.start={config.start}')

    def before(self, step: int) -> None:
        """Starts the trace if it is due; call it before each step, with the number of steps made."""
        if self._wanted and step == self._config.start:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._active = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace if it is due; call it after each step, with the number of steps and its results."""
        if self._active and step >= self._config.start + self._config.steps:
            jax.block_until_ready(results)
            self.close()
            log(f'steps {self._config.start + 1} to {step} are profiled: {self._folder}')

    def close(self) -> None:
        """Ends a trace that is still active."""
        if not self._active:
            return
        self._active = False
        try:
            jax.profiler.stop_trace()
        except (OSError, ValueError, RuntimeError) as e:  # the run itself can continue
            log(f'the profile could not be written: {one_line(e)}')
