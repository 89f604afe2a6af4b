"""A trace of some steps, to be opened with TensorBoard (plugin `tensorboard-plugin-profile`) or Perfetto."""

from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from epsanet_jax.errors import one_line
from epsanet_jax.training.config import ProfileConfig
from epsanet_jax.workdir import PROFILE


class Profiler:
    """Traces the steps from `config.start` on, `config.steps` of them; only process 0 does.

    Args:
        config: which steps.
        workdir: of the run, on a local disk; traces lie in its folder 'profile'.
        step: at which the run starts or continues.
        say: told where the trace is, or why there is none.
    """

    def __init__(self, config: ProfileConfig, workdir: epath.Path, step: int, say: Callable[[str], None]):
        self._config, self._folder, self._say = config, workdir / PROFILE, say
        self._wanted = config.steps > 0 and jax.process_index() == 0
        self._active = False
        if self._wanted and step > config.start:
            say(f'no profile: the run continues at step {step}, after config.profile.start={config.start}')

    def before(self, step: int) -> None:
        """To be called before a step, with the number of steps made."""
        if self._wanted and step == self._config.start:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._active = True

    def after(self, step: int, results: Any) -> None:
        """To be called after a step, with the steps made and its results."""
        if self._active and step >= self._config.start + self._config.steps:
            jax.block_until_ready(results)
            self.close()
            self._say(f'steps {self._config.start + 1} to {step} are profiled: {self._folder}')

    def close(self) -> None:
        """Ends a window that the run did not live to the end of."""
        if not self._active:
            return
        self._active = False
        try:
            jax.profiler.stop_trace()
        except (OSError, ValueError, RuntimeError) as e:  # of no matter for the run itself
            self._say(f'the profile could not be written: {one_line(e)}')
