"""Parameters, multiply-adds and activations of a network, stage by stage."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from epsanet_jax.models.conv import Conv, Linear
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.norm import BatchNorm


@dataclasses.dataclass
class Row:
    """One stage: `stem`, `layer1` .. `layer4`, `fc`.

    Attributes:
        stage: its name.
        output: shape of its output for one image.
        params: number of parameters.
        multiply_adds: of convolutions and linear layers, for one image.
        published_count: multiply_adds plus 2 for each element that BatchNorm gives, as the paper counts.
        activation_bytes: of what convolutions, BatchNorms and the linear layer give for one image, in the
            model's dtype: about what a training step keeps for the backward pass.
    """

    stage: str
    output: tuple[int, ...] = ()
    params: int = 0
    multiply_adds: int = 0
    published_count: int = 0
    activation_bytes: int = 0


def summarize(model: EPSANet, image_size: int = 224) -> list[Row]:
    """Returns a row for each stage of the network; nothing is computed, only shapes are.

    Args:
        model: the network.
        image_size: height and width of the image, pixels.
    """
    rows: dict[str, Row] = {}

    def count(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name != '__call__' or not module.path:
            return out
        top = module.path[0].split('_')[0]
        stage = 'stem' if top in ('conv1', 'bn1') else top
        row = rows.setdefault(stage, Row(stage))
        if isinstance(module, Conv | Linear | BatchNorm):
            row.activation_bytes += out.size * out.dtype.itemsize
        if isinstance(module, Conv | Linear):
            kernel = module.variables['params']['kernel']
            row.multiply_adds += math.prod(out.shape[:-1]) * kernel.size
            row.published_count += math.prod(out.shape[:-1]) * kernel.size
        elif isinstance(module, BatchNorm):
            row.published_count += 2 * out.size
        if len(module.path) == 1:
            row.params += sum(p.size for p in jax.tree.leaves(module.variables['params']))
            # The stem's max-pool, which is no module, halves what the last of its modules gives.
            row.output = (
                out.shape[1:] if stage != 'stem' else (*(-(-s // 2) for s in out.shape[1:3]), out.shape[3])
            )
        return out

    def forward(key):
        with nn.intercept_methods(count):
            return model.init(key, jnp.zeros((1, image_size, image_size, 3), model.dtype))

    jax.eval_shape(forward, jax.random.key(0))
    return list(rows.values())
