"""Where a network looks, and which kernels it uses.

`grad_cam` and `attention` are pure functions of arrays, usable under jit and vmap; `explain` reads images.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from epsanet_jax.data.classes import composed
from epsanet_jax.errors import InputError, suggest
from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.models.epsanet import EPSANet, check_stage
from epsanet_jax.models.epsanet import stages as all_stages
from epsanet_jax.models.settings import pyramid_of
from epsanet_jax.weights.files import as_network
from epsanet_jax.weights.network import Network

if TYPE_CHECKING:
    from epsanet_jax.data.image_files import ImageFile, OnBad


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The explanation of one image.

    Attributes:
        name: name of the image.
        image: preprocessed image [H, W, C], with values from 0 to 255 for images of 8 bits.
        names: names of all classes.
        probabilities: probabilities of all classes, [num_classes].
        classes: numbers of the explained classes, int [K].
        cams: Grad-CAM of each stage, [K, H, W].
        attention: attention of each stage, [blocks, S], means over channels; empty without attention.
        kernels: labels of the S branches of each stage.
    """

    name: str
    image: np.ndarray
    names: Sequence[str]
    probabilities: np.ndarray
    classes: np.ndarray
    cams: dict[str, np.ndarray]
    attention: dict[str, np.ndarray]
    kernels: dict[str, list[str]]


def grad_cam(
    model: EPSANet,
    variables: Any,
    images: jax.Array,
    classes: jax.Array | int,
    stage: str = 'layer4',
    upsample: bool = True,
) -> jax.Array:
    """Returns Grad-CAM maps: the image regions whose activations increase the logit of a class.

    Selvaraju et al. (2017), arXiv:1610.02391, equations 1 and 2: with the activations A [h, w, C] after a
    stage and the logit y of the class, a channel's weight is the spatial mean of dy/dA, and the map is
    relu(sum over channels of weight * A). Maps are in units of the logit and are not rescaled.

    Args:
        model: network from `create_model`.
        variables: {'params', 'batch_stats'}.
        images: normalised images [N, H, W, 3].
        classes: class numbers, integers [N], or one for all images. They are not checked, since their values
            are not known under jit: a number without a class gives zeros or NaN.
        stage: 'stem', 'layer1' .. 'layer4'.
        upsample: whether to resize the maps to the size of the images, bilinearly.

    Returns:
        [N, H, W], or with `upsample=False` [N, H/s, W/s] for a stage of stride s; at least float32.

    Raises:
        InputError: there is no such stage, or the images are invalid, see `EPSANet.features`.
    """
    check_stage(model, stage)
    features: Any = model.apply(variables, images, method='features')
    features = features[stage]  # [N, h, w, C]
    classes = jnp.broadcast_to(jnp.asarray(classes), images.shape[:1])

    def chosen_logits(features: jax.Array) -> jax.Array:
        # In evaluation images are independent, so the gradient of the sum holds each image's gradient.
        logits: Any = model.apply(variables, features, stage, method='logits_from')
        return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()

    wide = at_least_float32(features.dtype)
    weights = jax.grad(chosen_logits)(features).mean(axis=(1, 2), dtype=wide)  # [N, C]
    cam = jax.nn.relu(jnp.einsum('nhwc,nc->nhw', features.astype(wide), weights))
    return jax.image.resize(cam, images.shape[:3], 'bilinear') if upsample else cam


def attention(model: EPSANet, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the attention of the pyramids: the weight of each branch, for each channel of each image.

    Zhang et al. (2021), arXiv:2105.14447, section 3: a softmax over the branches of the sigmoids of the
    shared squeeze-and-excitation module. Values lie between 1 / (1 + (S - 1) e) and e / (e + S - 1), which is
    0.11 to 0.48 for S = 4 branches; the equal share is 1 / S.

    Args:
        model: network from `create_model`.
        variables: {'params', 'batch_stats'}.
        images: normalised images [N, H, W, 3].

    Returns:
        For each stage, 'layer1' .. 'layer4', [N, blocks, S, planes / S]: the branches in the order of
        `model.kernels`, each with its channels. Sums over the branches are 1; a single branch has 1.

    Raises:
        InputError: the network has no attention.
    """
    if model.middle != 'psa':
        raise InputError(f'a network with middle={model.middle!r} has no attention: use an EPSANet')
    _, state = model.apply(variables, images, method='features', mutable=['intermediates'])
    sown: Any = state['intermediates']
    return {
        f'layer{stage}': jnp.stack(
            [sown[f'layer{stage}_{block}']['conv2']['attention'][0] for block in range(blocks)], axis=1
        )
        for stage, blocks in enumerate(model.layers, start=1)
    }


def kernel_labels(model: EPSANet) -> dict[str, list[str]]:
    """Returns labels of each stage's branches: '3x3', '5x5', '5x5 (2nd)', '7x7'; empty without attention."""
    labels: dict[str, list[str]] = {}
    for stage in range(len(model.layers) if model.middle == 'psa' else 0):
        kernels, own = pyramid_of(model, stage)[0], labels.setdefault(f'layer{stage + 1}', [])
        for i, kernel in enumerate(kernels):
            nth = kernels[:i].count(kernel) + 1
            ending = {2: 'nd', 3: 'rd'}.get(nth, 'th')
            own.append(f'{kernel}x{kernel}' + (f' ({nth}{ending})' if nth > 1 else ''))
    return labels


def explain(
    network: Network | str,
    paths: Sequence[str],
    stages: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    batch_size: int = 8,
    *,
    on_bad: 'OnBad | None' = None,
    without: str | None = None,
) -> Generator[tuple['ImageFile', Explanation], None, None]:
    """Yields the explanation of each image: probabilities, Grad-CAM and attention.

    Args:
        network: a network, or the path of its weights, see `weights.load`.
        paths: image files, and folders, which are searched with their subfolders.
        stages: stages for Grad-CAM; None: the last stage.
        classes: names or numbers of the classes to explain; None: the top class of each image.
        batch_size: images per batch.
        on_bad: called with a message for each image that cannot be decoded; raises an error by default.
        without: folder to leave out.

    Raises:
        InputError: a path, stage or class does not exist, or the network has no classifier.
    """
    from epsanet_jax.analysis.predict import run  # needs libraries that Grad-CAM and attention do not need
    from epsanet_jax.data.image_files import stop_at_bad

    network = as_network(network)
    model, names = network.model, network.labels
    if not model.num_classes:
        raise InputError(f'{network.source.path or "the network"} has no classifier to explain')
    stages = list(dict.fromkeys(stages or all_stages(model)[-1:]))
    for stage in stages:
        check_stage(model, stage)
    numbers = None if classes is None else find_classes(classes, names)
    kernels = kernel_labels(model)
    step = make_step(model, stages, numbers)
    with contextlib.closing(run(step, network, paths, batch_size, on_bad or stop_at_bad, without)) as rows:
        for file, image, _, found in rows:
            yield file, Explanation(name=file.below, image=image, names=names, kernels=kernels, **found)


def make_step(
    model: EPSANet, chosen_stages: Sequence[str], classes: Sequence[int] | None
) -> Callable[[Any, jax.Array], tuple[jax.Array, dict[str, Any]]]:
    """Returns the function `(variables, images) -> (logits, fields of Explanation)` that explains a batch."""

    def step(variables: Any, images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        logits: Any = model.apply(variables, images, train=False)
        probabilities = jax.nn.softmax(logits)
        if classes is None:
            chosen = probabilities.argmax(axis=-1, keepdims=True)  # [N, 1]
        else:
            chosen = jnp.broadcast_to(jnp.asarray(classes), (len(images), len(classes)))  # [N, K]

        def cam(classes: jax.Array, stage: str) -> jax.Array:
            return grad_cam(model, variables, images, classes, stage)

        cams = jax.vmap(cam, in_axes=(1, None), out_axes=1)
        shares = attention(model, variables, images) if model.middle == 'psa' else {}
        return logits, {
            'probabilities': probabilities,
            'classes': chosen,
            'cams': {stage: cams(chosen, stage) for stage in chosen_stages},
            'attention': {stage: a.mean(axis=-1) for stage, a in shares.items()},
        }

    return step


def find_classes(chosen: Sequence[str], names: Sequence[str]) -> list[int]:
    """Returns the numbers of classes that are given by name or, if no class has this name, by number.

    Raises:
        InputError: there is no such class.
    """
    numbers, names = [], list(map(composed, names))
    for text in map(composed, chosen):
        if text in names:
            numbers.append(names.index(text))
        elif text.isascii() and text.isdecimal() and int(text) < len(names):
            numbers.append(int(text))
        else:
            raise InputError(
                f'no class {text!r}{suggest(text, names)}; give a name or a number from 0 to {len(names) - 1}'
            )
    return list(dict.fromkeys(numbers))
