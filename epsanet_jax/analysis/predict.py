"""Predictions for image files, as a stream: memory does not grow with the number of images."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from epsanet_jax.data import image_files
from epsanet_jax.data.augment import normalize
from epsanet_jax.data.image_files import ImageFile, OnBad
from epsanet_jax.data.pipeline import Reading
from epsanet_jax.data.transforms import CentreCrop
from epsanet_jax.errors import InputError
from epsanet_jax.models.folding import fold_batch_norm
from epsanet_jax.weights.files import as_network
from epsanet_jax.weights.network import Network

BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        path: path of the image.
        classes: numbers of the top classes, int [K], the most probable first.
        probabilities: probabilities of these classes, float [K].
        logits: logits of all classes, float [num_classes].
    """

    path: str
    classes: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray


def predict(
    network: Network | str,
    paths: Sequence[str],
    *,
    top: int = 5,
    batch_size: int = BATCH_SIZE,
    on_bad: OnBad = image_files.stop_at_bad,
) -> Generator[Prediction, None, None]:
    """Yields a prediction for each image, in order, while later images are being read.

    Images are resized, cropped and normalised as the network's preprocessing says. All batches have one shape
    and are compiled once, for one device, with BatchNorm folded into the convolutions.

    Args:
        network: a network, or the path of its weights, see `weights.load`.
        paths: image files, and folders, which are searched with their subfolders.
        top: number of classes per image, at most all classes.
        batch_size: images per batch; smaller if there are fewer images.
        on_bad: called with a message for each image that cannot be decoded; raises an error by default.

    Raises:
        InputError: a path does not exist, a folder holds no image, `top` or `batch_size` is less than 1, or
            the logits are not finite.
    """
    for option, value in (('top', top), ('batch_size', batch_size)):
        if value < 1:
            raise InputError(f'{option} must be at least 1, got {value}')
    network = as_network(network)
    if not network.model.num_classes:
        raise InputError(f'{network.source.path or "the network"} has no classifier to predict with')
    model, variables = fold_batch_norm(network.model, network.variables)
    network = dataclasses.replace(network, model=model, variables=variables)

    def step(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images), ()

    with contextlib.closing(run(step, network, paths, batch_size, on_bad)) as rows:
        for file, _, logits, _ in rows:
            # Outside of the compiled step, so that another `top` does not compile it again.
            shares = np.exp(logits - logits.max())
            classes = np.argsort(-logits, kind='stable')[:top]
            yield Prediction(file.path, classes, shares[classes] / shares.sum(), logits)


def run(
    step: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
    network: Network,
    paths: Sequence[str],
    batch_size: int,
    on_bad: OnBad,
    without: str | None = None,
) -> Generator[tuple[ImageFile, np.ndarray, np.ndarray, Any], None, None]:
    """Yields each image with the results of a function of batches.

    `step` is `(variables, normalised images [N, H, W, C]) -> (logits [N, num_classes], tree of arrays
    [N, ...])`; it is compiled here. `without` is a folder to leave out. For other arguments and errors see
    `predict`.

    Yields:
        The file, the preprocessed image [H, W, C] of the batch, its logits and its rows of the tree.
    """
    if isinstance(paths, str):
        raise InputError(f'paths must be a list of paths, got {paths!r}')
    image_files.check_paths(paths, without)
    model, preprocessing = network.model, network.preprocessing
    crop = CentreCrop(preprocessing.image_size, preprocessing.resize_size)
    count = sum(1 for _ in itertools.islice(image_files.find_images(paths, without=without), batch_size))
    rows = min(batch_size, 2 ** (count - 1).bit_length())  # for few images a power of 2: few compilations

    @jax.jit
    def compiled(variables: Any, images: jax.Array) -> Any:
        return step(variables, normalize(images, preprocessing.mean, preprocessing.std, model.dtype))

    variables = jax.device_put(network.variables)
    found = image_files.find_images(paths, on_bad, without)
    threads, exif_orientation = Reading().threads_each(), preprocessing.exif_orientation
    batches = image_files.read_batches(
        found, crop, rows, threads, exif_orientation, preprocessing.channels, on_bad
    )
    waiting = None  # the previous batch, which the device computes while the next one is read
    with contextlib.closing(batches):
        for batch, images in batches:
            computed = compiled(variables, images)
            if waiting is not None:
                yield from _each(*waiting)
            waiting = batch, images, computed
        if waiting is not None:
            yield from _each(*waiting)


def _each(
    batch: list[ImageFile], images: np.ndarray, computed: Any
) -> Iterator[tuple[ImageFile, np.ndarray, np.ndarray, Any]]:
    computed = jax.device_get(computed)
    for row, file in enumerate(batch):
        logits, rest = jax.tree.map(lambda a, row=row: a[row], computed)
        if not np.isfinite(logits).all():
            raise InputError(f'{file.path}: the logits are not finite: the weights may be damaged')
        yield file, images[row], logits, rest
