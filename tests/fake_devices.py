"""XLA's flags for tests: several CPU devices, and code that is quickly made."""

import os

# Half the time of the tests is compilation. The program stays the same; its machine code is not optimised.
_UNOPTIMISED = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'


def xla_flags(devices: int) -> str:
    """Returns a value for the environment variable XLA_FLAGS.

    `make test-slow` and `make test-faults` set EPSANET_TESTS_OPTIMIZE=1, for code as users have it.
    """
    flags = [] if os.environ.get('EPSANET_TESTS_OPTIMIZE') else [_UNOPTIMISED]
    return ' '.join([f'--xla_force_host_platform_device_count={devices}', *flags])
