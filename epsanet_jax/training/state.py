"""The training state: parameters, BatchNorm statistics, averages, optimizer state and step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from epsanet_jax.models.epsanet import EPSANet, abstract_images


@flax.struct.dataclass
class TrainState:
    """The training state, a pytree; `training.steps` updates it.

    Attributes:
        step: number of updates made, int32.
        params: the model's parameters.
        batch_stats: BatchNorm's running statistics.
        opt_state: state of the optimizer.
        ema: moving averages {'params', 'batch_stats'}; None if the run keeps none.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for `model.apply`."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


def create_state(
    model: EPSANet,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_size: int,
    ema: bool = False,
) -> TrainState:
    """Returns a new state; call it under `jax.jit` or `jax.eval_shape`.

    Parameters are drawn with `key` and do not depend on `image_size` (pixels). With `ema` the state holds
    moving averages.
    """
    variables = model.init(key, jnp.zeros(abstract_images(model, image_size).shape, model.dtype))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=optimizer.init(variables['params']),
        ema=jax.tree.map(jnp.copy, dict(variables)) if ema else None,
    )
