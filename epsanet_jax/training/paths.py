"""Paths on local disks and in buckets."""

import os

from etils import epath

from epsanet_jax.errors import InputError, one_line


def resolve(path: str) -> epath.Path:
    """Returns an absolute path; a URI such as gs://bucket/run stays as it is.

    Raises:
        InputError: the URI is of an unknown kind.
    """
    try:
        return epath.Path(path) if is_remote(path) else epath.Path(os.path.expanduser(path)).absolute()
    except (KeyError, ImportError, ValueError) as e:
        raise InputError(f'cannot use the path {path}: {one_line(e)}') from e


def is_remote(path: object) -> bool:
    """Whether a path is a URI."""
    return '://' in str(path)
