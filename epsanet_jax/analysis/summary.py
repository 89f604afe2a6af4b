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
    """Counts of one stage, for one image.

    Attributes:
        stage: 'stem', 'layer1' .. 'layer4' or 'fc'.
        output: shape of the output.
        params: number of parameters.
        multiply_adds: multiply-adds of convolutions and linear layers.
        published_count: multiply_adds plus 2 for each output element of a BatchNorm, as the paper counts.
        activation_bytes: size of the outputs of convolutions, BatchNorms and the linear layer in the model's
            dtype; about the memory that a training step keeps for the backward pass.
    """

    stage: str
    output: tuple[int, ...] = ()
    params: int = 0
    multiply_adds: int = 0
    published_count: int = 0
    activation_bytes: int = 0


def summarize(model: EPSANet, image_size: int = 224) -> list[Row]:
    """Returns a row for each stage of a network, from shapes alone.

    Args:
        model: network from `create_model`.
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
            multiply_adds = math.prod(out.shape[:-1]) * module.variables['params']['kernel'].size
            row.multiply_adds += multiply_adds
            row.published_count += multiply_adds
        elif isinstance(module, BatchNorm):
            row.published_count += 2 * out.size
        if len(module.path) == 1:
            row.params += sum(p.size for p in jax.tree.leaves(module.variables['params']))
            row.output = out.shape[1:]
            if stage == 'stem' and model.pools_stem:  # the max-pooling is not a module
                row.output = (*(-(-s // 2) for s in out.shape[1:3]), out.shape[3])
        return out

    def forward(key):
        with nn.intercept_methods(count):
            return model.init(key, jnp.zeros((1, image_size, image_size, model.in_channels), model.dtype))

    jax.eval_shape(forward, jax.random.key(0))
    return list(rows.values())
