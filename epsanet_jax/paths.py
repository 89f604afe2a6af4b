"""Paths on local disks and in buckets, and atomic writes."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator

from etils import epath

from epsanet_jax.errors import InputError, one_line


def resolve(path: str | os.PathLike[str]) -> epath.Path:
    """Returns an absolute path, with '~' expanded. A URI such as gs://bucket/run is not changed.

    Raises:
        InputError: the scheme of the URI is unknown.
    """
    try:
        return epath.Path(path) if is_remote(path) else epath.Path(os.path.expanduser(path)).absolute()
    except (KeyError, ImportError, ValueError) as e:
        raise InputError(f'cannot use the path {path}: {one_line(e)}') from e


def is_remote(path: object) -> bool:
    """Returns whether a path is a URI."""
    return '://' in str(path)


def check_free(paths: Iterable[str], overwrite: bool, option: str) -> None:
    """Raises InputError if one of the files that a command is about to write exists.

    Args:
        paths: the files.
        overwrite: whether files (not folders) may be replaced.
        option: the argument that names them, for the message.
    """
    found = [path for path in paths if os.path.lexists(path) and (not overwrite or os.path.isdir(path))]
    if found:
        others = f' (and {len(found) - 1} more)' if len(found) > 1 else ''
        advice = '' if overwrite or os.path.isdir(found[0]) else ', or replace it with --overwrite'
        raise InputError(f'{found[0]} exists{others}; choose another {option}{advice}')


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[epath.Path]:
    """Yields a temporary path in the folder of `path`, and renames it to `path` on success.

    After an error the temporary file is removed, and an existing file at `path` is unchanged.
    """
    final = epath.Path(path)
    # Not derived from the file name, which may already have the maximum length.
    temporary = final.parent / f'.tmp-{os.getpid()}-{secrets.token_hex(4)}'
    try:
        yield temporary
        temporary.replace(final)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_atomically(path: str, write: Callable[[str], object]) -> None:
    """Calls `write` with a temporary path in the same folder, and renames the file to `path`.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            write(str(temporary))
    except (OSError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
        raise InputError(f'cannot write {path}: {one_line(e, 200)}') from e
