"""Writes metrics as events for TensorBoard."""

import os
import time
from typing import Any

from etils import epath

from epsanet_jax.errors import InputError
from epsanet_jax.workdir import TENSORBOARD

_NO_CURVE = ('split', 'step', 'examples')


class Events:
    """Writes lines of metrics.jsonl as scalars 'train/loss', 'eval/top1' and so on.

    Events are in the folder 'tensorboard' of the workdir, which must be on a local disk. The run starts or
    continues at `step`; TensorBoard ignores older events of later steps.

    Raises:
        InputError: the folder cannot be created or written to.
    """

    def __init__(self, workdir: epath.Path, step: int):
        # Not SummaryWriter: it writes in a thread and waits for it forever when the disk is full.
        # Imported late because it imports torch if available, which takes seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        # TensorBoard sorts the files by the second of their creation and then by this.
        suffix = f'.{step:09}.{os.getpid()}'
        folder = workdir / TENSORBOARD
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / 'events'), suffix)
            # TensorBoard drops older events from this step on.
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
            self._writer.flush()
        except OSError as e:
            raise InputError(f'cannot write to {folder}: {e.strerror or e}') from e

    def write(self, line: dict[str, Any]) -> None:
        """Writes the numbers of a line to the disk, under their names."""
        from tensorboardX.summary import scalar

        for name, value in line.items():
            if name not in _NO_CURVE and value is not None:
                self._add(line['step'], summary=scalar(f'{line["split"]}/{name}', value))
        self._writer.flush()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
