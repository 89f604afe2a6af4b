"""The compilation cache: compiling takes minutes on a CPU, a second start should not."""

import os

import jax


def use_persistent_cache() -> None:
    """Keeps compiled programs in ~/.cache/epsanet_jax/xla, unless JAX_COMPILATION_CACHE_DIR says where."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser('~/.cache/epsanet_jax/xla'))
