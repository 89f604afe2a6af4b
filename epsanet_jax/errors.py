"""The exceptions that are told in one line."""

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave is wrong: a name, a shape, a file, a setting.

    The message is one line, shows the offending value and says what to do. Commands print it and exit
    with status 2; everything else that goes wrong is a bug and keeps its traceback.
    """


class TrainingError(RuntimeError):
    """A training cannot go on, although the input was in order: the loss is not finite, say.

    Commands print the message, one line, and exit with status 1.
    """


INTERRUPTED = 75  # exit status, EX_TEMPFAIL of sysexits.h: try again, with the same command


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """A run was asked to stop and has saved what it has; the same command continues it.

    Commands print the message and exit with status 75.
    """


def one_line(error: BaseException | str, limit: int | None = 300) -> str:
    """Returns a message as one line of at most `limit` characters."""
    return ' '.join(str(error).split())[:limit]


def suggest(name: str, known: Sequence[str]) -> str:
    """Returns " (did you mean 'x'?)" for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f' (did you mean {near[0]!r}?)' if near else ''


def some(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names as 'a, b and 3 more'."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
