"""Memory of steps on a CPU, kept from one step to the next."""

import ctypes

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def allocate_in_main_thread() -> None:
    """Lets the main thread compute what is computed on CPUs; has to be called before JAX starts.

    Then a step's memory comes from that thread's part of the heap, which can keep it: large pieces for other
    threads are always fetched from the kernel.
    """
    jax.config.update('jax_cpu_enable_async_dispatch', False)


def keep_freed_memory() -> None:
    """Lets a process keep what it frees from now on, if it computes in its main thread.

    That is, without JAX's asynchronous dispatch on CPUs (`allocate_in_main_thread`). Does nothing in
    others, which would keep little by it and have settings of their own, nor where the C library is not
    glibc.

    XLA:CPU allocates the temporary memory of a step as one piece and frees it behind the step. glibc returns
    such pieces to the kernel, and fetching them again, page by page, takes up to a fifth of a step. Called
    after compilation, which needs much memory in small pieces, and once.
    """
    if jax.config.read('jax_cpu_enable_async_dispatch'):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # as a size_t: never
