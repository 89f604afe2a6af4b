"""What training changes: parameters, BatchNorm statistics, averages, the optimizer's buffers, step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from epsanet_jax.models.epsanet import EPSANet, abstract_images


@flax.struct.dataclass
class TrainState:
    """A pytree; `apply_gradients` and friends are left to `training.steps`.

    Attributes:
        step: number of updates made, int32.
        params: the model's parameters.
        batch_stats: BatchNorm's running statistics.
        opt_state: the optimizer's.
        ema: moving averages of both, {'params', 'batch_stats'}; None if there are none.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """For `model.apply`."""
        return {'params': self.params, 'batch_stats': self.batch_stats}


def create_state(
    model: EPSANet,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_size: int,
    ema: bool = False,
) -> TrainState:
    """Initialises everything; to be called under `jax.jit` or `jax.eval_shape`.

    Args:
        model: the network.
        optimizer: its state is made for the parameters.
        key: random key of the initial parameters.
        image_size: height and width, pixels; does not change the parameters.
        ema: whether moving averages are kept.
    """
    variables = model.init(key, jnp.zeros(abstract_images(model, image_size).shape, model.dtype))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=optimizer.init(variables['params']),
        ema=jax.tree.map(jnp.copy, dict(variables)) if ema else None,
    )
