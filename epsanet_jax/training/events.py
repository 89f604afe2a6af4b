"""Events for TensorBoard."""

import os
from typing import Any

from etils import epath

from epsanet_jax.errors import InputError

FOLDER = 'tensorboard'
_UNDRAWN = ('split', 'step', 'examples')


class Events:
    """Writes lines of metrics.jsonl as scalars 'train/loss', 'eval/top1' and so on.

    Args:
        workdir: of the run, on a local disk; events lie in its folder 'tensorboard'.
        step: at which the run starts or continues; TensorBoard leaves out earlier events of later steps.

    Raises:
        InputError: the folder cannot be made or written to.
    """

    def __init__(self, workdir: epath.Path, step: int):
        from tensorboardX import SummaryWriter  # imports torch, where there is one: seconds

        # Files are told apart, and put in order, by the second and then by this.
        suffix = f'.{step:09}.{os.getpid()}'
        try:
            self._writer = SummaryWriter(str(workdir / FOLDER), purge_step=step + 1, filename_suffix=suffix)
        except OSError as e:
            raise InputError(f'cannot write to {workdir / FOLDER}: {e.strerror or e}') from e

    def write(self, line: dict[str, Any]) -> None:
        """Writes the numbers of a line, under their names."""
        for name, value in line.items():
            if name not in _UNDRAWN and value is not None:
                self._writer.add_scalar(f'{line["split"]}/{name}', value, line['step'])

    def flush(self) -> None:
        """Puts everything onto the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
