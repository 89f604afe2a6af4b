"""Predictions for pictures from files, as a stream: memory does not grow with their number."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
    """What a network makes of one picture.

    Attributes:
        path: of the picture.
        classes: int [K], the numbers of the K likeliest classes, the likeliest first.
        probabilities: float [K], of these classes.
        logits: float [num_classes].
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
    """Yields a prediction for every picture, in order, while later ones are being read.

    Pictures are resized, cut and normalised as the weights' metadata say. All batches have one shape, so
    there is one compilation; the computation is on one device, with BatchNorm folded into the convolutions.

    Args:
        network: a network, or the path of its weights, see `weights.load`.
        paths: of pictures, and of folders, whose pictures are found at any depth.
        top: how many classes to name; all of them if there are fewer.
        batch_size: pictures computed at once, fewer if there are fewer.
        on_bad: told of each picture that cannot be decoded, in one line; by default that raises.

    Raises:
        InputError: a path is not there, or a folder has no picture; `top` or `batch_size` is less than 1; or
            the network's outputs are no numbers.
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

    rows = run(step, network, paths, batch_size, on_bad)
    with contextlib.closing(rows):
        for file, _, logits, _ in rows:
            # Here, not in the compiled step, which is then the same one for any `top`.
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
    """Yields each picture with what a function of batches computes for it.

    Args:
        step: `(variables, images [N, H, W, 3], normalised) -> (logits [N, num_classes], tree of arrays
            [N, ...])`, to be compiled.
        network: whose preprocessing the images go through.
        paths: of images and folders, see `predict`.
        batch_size: images computed at once.
        on_bad: called with a line for each image that cannot be decoded.
        without: see `image_files.find_images`.

    Yields:
        The file, its picture as the network sees it, uint8 [H, W, 3], its logits and its rows of the tree.

    Raises:
        InputError: see `predict`.
    """
    if isinstance(paths, str):
        raise InputError(f'paths must be a list of paths, got {paths!r}')
    image_files.check_paths(paths, without)
    model, preprocessing = network.model, network.preprocessing
    crop = CentreCrop(preprocessing.image_size, preprocessing.resize_size)
    rows = _rows(itertools.islice(image_files.find_images(paths, without=without), batch_size), batch_size)

    @jax.jit
    def compiled(variables: Any, images: jax.Array) -> Any:
        return step(variables, normalize(images, preprocessing.mean, preprocessing.std, model.dtype))

    variables = jax.device_put(network.variables)
    found = image_files.find_images(paths, on_bad, without)
    exif_orientation = preprocessing.exif_orientation
    batches = image_files.read_batches(found, crop, rows, Reading().threads_each(), exif_orientation, on_bad)
    waiting = None  # the batch before, which the device computes while the next one is read
    with contextlib.closing(batches):
        for batch, images in batches:
            computed = compiled(variables, images)
            if waiting is not None:
                yield from _each(*waiting)
            waiting = batch, images, computed
        if waiting is not None:
            yield from _each(*waiting)


def _rows(found: Iterable[Any], batch_size: int) -> int:
    """Returns the batch size: a power of 2 that holds all if they are few, for few different compilations."""
    count = sum(1 for _ in found)
    return min(batch_size, 2 ** (count - 1).bit_length())


def _each(
    batch: list[ImageFile], images: np.ndarray, computed: Any
) -> Iterator[tuple[ImageFile, np.ndarray, np.ndarray, Any]]:
    computed = jax.device_get(computed)
    for row, file in enumerate(batch):
        logits, rest = jax.tree.map(lambda a, row=row: a[row], computed)
        if not np.isfinite(logits).all():
            raise InputError(f'{file.path}: the logits are not finite; are the weights damaged?')
        yield file, images[row], logits, rest
