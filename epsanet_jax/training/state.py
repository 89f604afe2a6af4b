"""What training changes: parameters, BatchNorm statistics, the optimizer's buffers, the step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from epsanet_jax.models.epsanet import EPSANet


@flax.struct.dataclass
class TrainState:
    """A pytree; `apply_gradients` and friends are left to `training.steps`.

    Attributes:
        step: number of updates made, int32.
        params: the model's parameters.
        batch_stats: BatchNorm's running statistics.
        opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """For `model.apply`."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


def create_state(
    model: EPSANet, optimizer: optax.GradientTransformation, key: jax.Array, image_size: int
) -> TrainState:
    """Initialises everything; to be called under `jax.jit` or `jax.eval_shape`.

    Args:
        model: the network.
        optimizer: its state is made for the parameters.
        key: random key of the initial parameters.
        image_size: height and width, pixels; does not change the parameters.
    """
    variables = model.init(key, jnp.zeros((1, image_size, image_size, 3), model.dtype))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=optimizer.init(variables['params']),
    )
