"""Random access to the members of uncompressed tars."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from epsanet_jax.data.decode import BadImageError
from epsanet_jax.errors import InputError, one_line

_BLOCK = 512
_COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ\x00': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}


class Member(NamedTuple):
    """A file or folder in a tar."""

    name: str  # relative, without '.' and '..'
    size: int  # bytes
    mtime: int  # time of the last change in nanoseconds
    offset: int  # position of its first byte in the tar; -1 for a folder


def members(path: str, start: int = 0, size: int | None = None, called: str = '') -> Iterator[Member]:
    """Yields the files and folders of an uncompressed tar, or of a tar that is a member of it.

    Args:
        path: path of the tar.
        start: position of the inner tar; offsets still count from the start of the outer tar.
        size: bytes of the inner tar.
        called: its name for messages; '': the path.

    Raises:
        InputError: the file is not a tar, is compressed or truncated, or holds a link, a device, or a name
            outside of the folder into which it would be unpacked.
    """
    called = called or path
    try:
        with open(path, 'rb') as f:
            end = f.seek(0, os.SEEK_END) if size is None else start + size
            f.seek(start)
            _refuse_compressed(f, called)
            with tarfile.open(fileobj=f, mode='r:') as tar:
                while (header := tar.next()) is not None:
                    tar.members.clear()  # a million of them would take gigabytes
                    if header.offset_data + header.size > end:
                        raise InputError(
                            f'{called} is truncated in {header.name!r}: download or copy it again'
                        )
                    offset = -1 if header.isdir() else header.offset_data
                    yield Member(_safe_name(header, called), header.size, int(header.mtime * 10**9), offset)
                # tarfile stops silently at damage; a tar ends with a block of zeros.
                f.seek(tar.offset)
                mark = f.read(_BLOCK)
            if len(mark) < _BLOCK or any(mark) or tar.offset >= end:
                raise InputError(
                    f'{called} is truncated or damaged at byte {tar.offset}: download or copy it again'
                )
    except InputError:
        raise
    except (tarfile.TarError, ValueError) as e:
        raise InputError(f'{called} is not a tar, or damaged: {one_line(e)}') from e
    except OSError as e:
        raise InputError(f'cannot read {called}: {e.strerror or one_line(e)}') from e


def read_member(path: str, offset: int, size: int) -> bytes:
    """Returns the bytes of a member.

    Raises:
        BadImageError: the tar ends within it.
        OSError: the tar cannot be read.
    """
    with open(path, 'rb') as tar:
        tar.seek(offset)
        content = tar.read(size)
    if len(content) < size:
        raise BadImageError('cannot read the image: the tar ends within it')
    return content


def _safe_name(header: tarfile.TarInfo, called: str) -> str:
    name = header.name
    if name.startswith('/') or '..' in name.split('/'):
        reason = 'outside of the folder'
    elif header.issym() or header.islnk():
        reason = 'a link'
    elif not (header.isdir() or header.isreg()) or header.issparse():
        reason = 'neither a file nor a folder'
    else:
        return posixpath.normpath(name)
    raise InputError(f'{called} holds {name!r}, which is {reason}: make the tar again without it')


def _refuse_compressed(f: BinaryIO, called: str) -> None:
    start = f.tell()
    magic = f.read(8)
    f.seek(start)
    for prefix, program in _COMPRESSED.items():
        if magic.startswith(prefix):
            raise InputError(
                f'{called} is compressed, which prevents random access: run `{program} -d` on it first'
            )
