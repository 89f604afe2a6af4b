"""Exceptions that commands print as one line, and helpers for messages."""

import difflib
from collections.abc import Sequence


class InputError(ValueError):
    """An input is wrong: a name, a shape, a file or a setting.

    The message is one line with the offending value and what to do. Commands print it and exit with status
    2. Any other exception is a bug and is shown with its traceback.
    """


class TrainingError(RuntimeError):
    """Training cannot continue although the input is valid, for example because the loss is not finite.

    Commands print the message as one line and exit with status 1.
    """


INTERRUPTED = 75  # exit status (EX_TEMPFAIL in sysexits.h): run the same command again to continue


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A run was asked to stop and has saved its state; the same command continues it.

    Commands print the message and exit with status 75.
    """


def one_line(error: BaseException | str, limit: int | None = 300) -> str:
    """Returns a message as one line of at most `limit` characters."""
    return ' '.join(str(error).split())[:limit]


def suggest(name: str, known: Sequence[str]) -> str:
    """Returns " (did you mean 'x'?)" for the known name most similar to `name`, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f' (did you mean {near[0]!r}?)' if near else ''


def some(names: Sequence[str], most: int = 5) -> str:
    """Returns at most `most` names and the number of the others, as 'a, b and 3 more'."""
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
