"""The memory of steps on a CPU stays in the process."""

import platform
import subprocess
import sys

import jax
import pytest

from epsanet_jax.training import malloc

COUNT = """
import resource, sys
from epsanet_jax.training import malloc
if sys.argv[1] == 'kept':
    malloc.allocate_in_main_thread()
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # sorts 64 MiB: more than glibc keeps by default
    return jnp.sort(jnp.broadcast_to(x, (2, 2**23)), axis=0)[0, ::2**20].sum()

x = jnp.arange(2.0)[:, None]
step(x).block_until_ready()
if sys.argv[1] == 'kept':
    malloc.keep_freed_memory()
    step(x).block_until_ready()
counts = []
for _ in range(4):  # in 3 of 128 steps a small allocation prevents the reuse of a large one
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='the C library is not glibc')
@pytest.mark.slow
def test_a_second_step_gets_no_memory_from_the_kernel():
    def faults(how):
        done = subprocess.run([sys.executable, '-c', COUNT, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults('kept') < faults('returned') / 4  # a hundredth, unless there are huge pages


@pytest.mark.parametrize(('asynchronous', 'settings'), [(True, 0), (False, 2)])
def test_malloc_is_set_only_if_the_main_thread_computes(monkeypatch, asynchronous, settings):
    set_to = []

    class Library:
        def mallopt(self, *args):
            set_to.append(args)

    monkeypatch.setattr(malloc.ctypes, 'CDLL', lambda name: Library())
    before = jax.config.read('jax_cpu_enable_async_dispatch')
    jax.config.update('jax_cpu_enable_async_dispatch', asynchronous)
    try:
        malloc.keep_freed_memory()
    finally:
        jax.config.update('jax_cpu_enable_async_dispatch', before)
    assert len(set_to) == settings
