"""A trace of some steps, to be opened with TensorBoard (plugin `tensorboard-plugin-profile`) or Perfetto."""

from typing import Any

import jax
from etils import epath

from epsanet_jax.training.config import ProfileConfig

FOLDER = 'profile'


class Profiler:
    """Traces the steps from `config.start` on, `config.steps` of them.

    Args:
        config: which steps.
        workdir: of the run; traces lie in its folder 'profile'.

    Attributes:
        folder: where traces lie.
    """

    def __init__(self, config: ProfileConfig, workdir: epath.Path):
        self._config, self.folder = config, workdir / FOLDER
        self._active = False

    def before(self, step: int) -> None:
        """To be called before a step, with the number of steps made."""
        if self._config.steps and step == self._config.start:
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self._active = True

    def after(self, step: int, results: Any) -> bool:
        """To be called after a step, with the steps made and its results; whether the window ends here."""
        if not self._active or step < self._config.start + self._config.steps:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self) -> None:
        """Ends a window that the run did not live to the end of."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
