"""stdout and stderr that may be closed, or go away while the program runs."""

import contextlib
import io
import os
import sys
from types import TracebackType
from typing import Any, Self, TextIO

from epsanet_jax.errors import InputError

_NAMES = {1: 'stdout', 2: 'stderr'}


class ReaderGone(Exception):  # noqa: N818 (not an error)
    """The reader of stdout, `head` for example, has closed it."""


class Console:
    """Context in which writing to stdout and stderr does not fail, if they are those of the process.

    When one of them is lost (its reader is gone, the disk is full, the terminal is closed), the other one
    gets a line about it, and further output is dropped.

    Attributes:
        is_result: whether stdout is what the program is for. Its loss then raises ReaderGone, or InputError
            if there is another reason than that the reader is gone.
    """

    def __init__(self):
        self.is_result = False
        self._streams: dict[str, TextIO | None] = {}

    def __enter__(self) -> Self:
        _open_closed_descriptors()
        for number, name in _NAMES.items():
            self._streams[name] = stream = getattr(sys, name)
            if stream is None:  # Python found it closed
                setattr(sys, name, open(os.devnull, 'w'))
            elif _is_descriptor(stream, number):
                setattr(sys, name, self._lasting(stream, number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.is_result = False  # what is still buffered cannot change how the program ends
        for name, stream in self._streams.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)

    def check(self) -> None:
        """Raises InputError if stdout, which is needed, was closed from the start."""
        if self._streams['stdout'] is None:
            raise InputError('stdout is closed, but the result is written there')

    def lost(self, number: int, error: OSError) -> None:
        """Reports the loss of a descriptor, or raises if it is needed."""
        if number == 1 and self.is_result:
            if isinstance(error, BrokenPipeError):
                raise ReaderGone from error
            raise InputError(f'cannot write to stdout: {error.strerror}') from error
        if not self.is_result:
            line = f'cannot write to {_NAMES[number]} ({error.strerror}); continuing without it\n'
            with contextlib.suppress(OSError):
                os.write(3 - number, line.encode())

    def _lasting(self, stream: TextIO, number: int) -> TextIO:
        buffer = io.BufferedWriter(_Descriptor(number, self))
        at_once = bool(stream.line_buffering or getattr(stream, 'write_through', False))
        return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=at_once)


class _Descriptor(io.FileIO):
    """A file descriptor that drops what can no longer be written."""

    def __init__(self, number: int, console: Console):
        super().__init__(number, 'w', closefd=False)
        self._console, self._lost = console, False

    def write(self, data: Any) -> int | None:
        if not self._lost:
            try:
                return super().write(data)
            except OSError as e:
                self._lost = True
                self._console.lost(self.fileno(), e)
        return memoryview(data).nbytes


def _is_descriptor(stream: TextIO, number: int) -> bool:
    """Whether a stream writes to a descriptor of the process; notebooks and tests have other streams."""
    try:
        return stream.fileno() == number
    except (OSError, AttributeError):  # io.UnsupportedOperation is an OSError
        return False


def _open_closed_descriptors() -> None:
    """Connects closed descriptors with /dev/null: the next file, a checkpoint, would get their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
