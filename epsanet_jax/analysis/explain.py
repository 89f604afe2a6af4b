"""What a network looks at, and through which kernels: pure functions of arrays, usable under jit and vmap."""

from typing import Any

import jax
import jax.numpy as jnp

from epsanet_jax.errors import InputError
from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.models.epsanet import EPSANet, check_stage


def grad_cam(
    model: EPSANet,
    variables: Any,
    images: jax.Array,
    classes: jax.Array | int,
    stage: str = 'layer4',
    upsample: bool = True,
) -> jax.Array:
    """Returns Grad-CAM: where in each image a stage's activations speak for a class.

    Selvaraju et al. (2017), arXiv:1610.02391, equations 1 and 2: with A [h, w, C] the activations after a
    stage and y the logit of the class, a channel's weight is the spatial mean of dy/dA, and the map is
    relu(sum over channels of weight * A). It is in units of the logit, neither scaled nor cut off above.

    Args:
        model: from `create_model`.
        variables: {'params', 'batch_stats'}.
        images: [N, H, W, 3], normalised.
        classes: integers [N], or one for all images; where a number is that of no class, the map is zero or
            NaN, since values are not known under jit.
        stage: 'stem', 'layer1' .. 'layer4'.
        upsample: whether to enlarge the map to the images' size, bilinearly, as the paper's figures do.

    Returns:
        [N, H, W], or with `upsample=False` [N, H/s, W/s], s being the stage's stride; at least float32.

    Raises:
        InputError: there is no such stage, or the images are not what `EPSANet.features` takes.
    """
    check_stage(model, stage)
    features: Any = model.apply(variables, images, method='features')
    features = features[stage]  # [N, h, w, C]
    classes = jnp.broadcast_to(jnp.asarray(classes), images.shape[:1])

    def chosen_logits(features: jax.Array) -> jax.Array:
        # Without training, images do not see each other: the sum's gradient is each image's own.
        logits: Any = model.apply(variables, features, stage, method='logits_from')
        return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()

    wide = at_least_float32(features.dtype)
    weights = jax.grad(chosen_logits)(features).mean(axis=(1, 2), dtype=wide)  # [N, C]
    cam = jax.nn.relu(jnp.einsum('nhwc,nc->nhw', features.astype(wide), weights))
    return jax.image.resize(cam, images.shape[:3], 'bilinear') if upsample else cam


def attention(model: EPSANet, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the pyramids' attention: how much of each kernel every channel of every image takes.

    Zhang et al. (2021), arXiv:2105.14447, section 3: a softmax over the branches of the sigmoids of the
    shared squeeze-and-excitation module. Its entries lie between 1 / (1 + (S - 1) e) and e / (e + S - 1),
    for S = 4 branches from 0.11 to 0.48; equal shares are 1 / S.

    Args:
        model: from `create_model`.
        variables: {'params', 'batch_stats'}.
        images: [N, H, W, 3], normalised.

    Returns:
        For each stage, 'layer1' .. 'layer4', [N, blocks, S, planes / S]: the branches in the order of
        `model.kernels`, each with its channels; sums over the branches are 1.

    Raises:
        InputError: the network has no pyramids.
    """
    if not has_pyramids(model):
        raise InputError(f'a network with middle={model.middle!r} has no attention to look at')
    _, state = model.apply(variables, images, method='features', mutable=['intermediates'])
    sown: Any = state['intermediates']
    return {
        f'layer{stage}': jnp.stack(
            [sown[f'layer{stage}_{block}']['conv2']['attention'][0] for block in range(blocks)], axis=1
        )
        for stage, blocks in enumerate(model.layers, start=1)
    }


def has_pyramids(model: EPSANet) -> bool:
    """Whether there is attention to look at; ResNets have none."""
    return model.middle == 'psa'


def kernel_labels(model: EPSANet) -> list[str]:
    """Returns what to call the branches: '3x3', '5x5', '5x5 (2nd)', '7x7'."""
    labels = []
    for i, kernel in enumerate(model.kernels):
        nth = model.kernels[:i].count(kernel) + 1
        ending = {2: 'nd', 3: 'rd'}.get(nth, 'th')
        labels.append(f'{kernel}x{kernel}' + (f' ({nth}{ending})' if nth > 1 else ''))
    return labels
