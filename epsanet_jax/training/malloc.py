"""Keeps the memory of steps on a CPU in the process, from one step to the next."""

import ctypes

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def allocate_in_main_thread() -> None:
    """Makes the main thread run computations on CPUs; call it before JAX is used.

    The memory of a step then belongs to the main thread's heap, which can keep it. In other threads, glibc
    always gets large blocks from the kernel.
    """
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def keep_freed_memory() -> None:
    """Makes the process keep the memory that it frees from now on. Call it once, after compilation.

    Does nothing unless `allocate_in_main_thread` was called and the C library is glibc.

    XLA:CPU allocates the temporary memory of a step as one block and frees it after the step. glibc returns
    such blocks to the kernel, and getting them again, page by page, takes up to a fifth of a step.
    Compilation frees many small blocks, which the process should not keep.
    """
    if jax.config.read('jax_cpu_enable_async_dispatch'):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # the largest size_t: never return memory
