"""The TPU generation that a program is lowered for: its memory, and algorithms of its own."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

# Without v5e, whose rows are those for all TPUs.
KINDS = {'TPU v4': 'v4', 'TPU v5': 'v5p', 'TPU v6 lite': 'v6e', 'TPU7x': 'tpu7x'}
_VMEM = {'TPU v2': 16, 'TPU v3': 16, 'TPU v4': 16, 'TPU v5': 64, 'TPU7x': 64}  # MiB; v5e and v6e have 128
_kind: contextvars.ContextVar[str] = contextvars.ContextVar('tpu_kind', default='')


@contextlib.contextmanager
def lowering_for(device_kind: str) -> Iterator[None]:
    """Makes what is lowered for TPUs inside it use the algorithms of a generation.

    Only needed to compile for TPUs that are not here. Otherwise the generation is that of JAX's devices.

    Args:
        device_kind: as devices name it, for example 'TPU v5'. Unknown kinds use the rows for all TPUs.
    """
    token = _kind.set(device_kind)
    try:
        yield
    finally:
        _kind.reset(token)


def rows_of(platform: str) -> str:
    """Returns the name of the rows of a platform, for a TPU of a known generation for example 'tpu v5p'."""
    if platform != 'tpu':
        return platform
    kind = _current_kind()
    return f'tpu {KINDS[kind]}' if kind in KINDS else platform


def vmem() -> int:
    """Returns the bytes of a TPU core's fast memory."""
    return _VMEM.get(_current_kind(), 128) * 2**20


def _current_kind() -> str:
    return _kind.get() or (jax.devices()[0].device_kind if jax.default_backend() == 'tpu' else '')
