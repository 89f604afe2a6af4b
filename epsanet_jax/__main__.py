"""`python -m epsanet_jax` is the command `epsanet`."""

import sys

from epsanet_jax.commands.main import main

sys.exit(main())
