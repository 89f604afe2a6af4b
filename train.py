"""Trains an EPSANet: python train.py --config=configs/digits.py --workdir=DIR [--config.FIELD=VALUE ...]."""

import jax

from epsanet_jax.commands.common import use_persistent_cache
from epsanet_jax.training import flags, loop
from epsanet_jax.training.config import Config
from epsanet_jax.training.malloc import allocate_in_main_thread


def main(config: Config, workdir: str) -> None:
    """Trains a network or continues the run in `workdir`, then prints how the run ended."""
    use_persistent_cache()
    allocate_in_main_thread()
    result = loop.train(config, workdir)
    if jax.process_index() > 0:
        return
    print(result)
    print(f'train longer: the same command with a larger --config.{"steps" if config.steps else "epochs"}')


if __name__ == '__main__':
    flags.run(main)
