"""Events for TensorBoard."""

import os
import time
from typing import Any

from etils import epath

from epsanet_jax.errors import InputError
from epsanet_jax.workdir import TENSORBOARD

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
        # Not its SummaryWriter: that writes in a thread, and waits for it for ever when the disk is full.
        # Imports torch, where there is one: seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        # Files are told apart, and put in order, by the second and then by this.
        suffix = f'.{step:09}.{os.getpid()}'
        folder = workdir / TENSORBOARD
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / 'events'), suffix)
            # Earlier events of this step and later ones are left out.
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
            self._writer.flush()
        except OSError as e:
            raise InputError(f'cannot write to {folder}: {e.strerror or e}') from e

    def write(self, line: dict[str, Any]) -> None:
        """Writes the numbers of a line, under their names, onto the disk."""
        from tensorboardX.summary import scalar

        for name, value in line.items():
            if name not in _UNDRAWN and value is not None:
                self._add(line['step'], summary=scalar(f'{line["split"]}/{name}', value))
        self._writer.flush()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
