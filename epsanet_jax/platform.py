"""Whether JAX can use the platform that it should."""

from epsanet_jax.errors import InputError, one_line


def check_platform() -> None:
    """Starts JAX's devices.

    Raises:
        InputError: there is no device of the platform that the environment variable JAX_PLATFORMS names.
    """
    import jax

    try:
        jax.devices()
    except Exception as e:  # a RuntimeError or, for a missing plugin, an AssertionError without a message
        reason = one_line(e, 200) or type(e).__name__
        raise InputError(
            f'JAX cannot use the platform JAX_PLATFORMS={jax.config.jax_platforms or ""}: {reason}; set '
            'JAX_PLATFORMS=cpu, or unset it to use what there is'
        ) from e
