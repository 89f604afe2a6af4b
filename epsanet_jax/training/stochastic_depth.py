"""Stochastic depth (Huang et al., 2016, arXiv:1603.09382): blocks that pictures skip in training."""

import jax
import jax.numpy as jnp

_STREAM = 17  # of a row's key: what is mixed is drawn from others


def draw_keep(keys: jax.Array, rate: float, blocks: int) -> jax.Array:
    """Draws the factors of the residual branches, for `EPSANet.__call__`.

    Block i of B is skipped with the probability p = rate * i / (B - 1), for each picture on its own, and
    its branch is multiplied by 1 / (1 - p) where it is not, so that evaluation needs no factor.

    Args:
        keys: [N], one a picture, from `data.augment.row_keys`.
        rate: probability of the last block, in [0, 1).
        blocks: their number B.

    Returns:
        [N, blocks], float32.
    """
    skipped = rate * jnp.arange(blocks, dtype=jnp.float32) / jnp.float32(max(1, blocks - 1))

    def draw(key: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(jax.random.fold_in(key, _STREAM), (blocks,), jnp.float32)
        return jnp.where(drawn >= skipped, 1 / (1 - skipped), 0)

    return jax.vmap(draw)(keys)
