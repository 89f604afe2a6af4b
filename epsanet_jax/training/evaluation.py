"""Evaluation that counts every example exactly once, for any batch size and number of devices."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from epsanet_jax.data import pipeline
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.sources import Source
from epsanet_jax.errors import InputError, Interrupted
from epsanet_jax.models.settings import check_types
from epsanet_jax.training import datasets, inputs, metrics, sharding
from epsanet_jax.training.config import Config, DataConfig
from epsanet_jax.training.steps import make_eval_step
from epsanet_jax.weights import Network
from epsanet_jax.weights.files import as_network
from epsanet_jax.weights.metadata import damage_as_input_error


def evaluate(
    network: Network | str,
    data: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 64,
    on_bad: str = 'stop',
    report: Callable[[str], None] = print,
    label_column: str | None = None,
    confusion: np.ndarray | None = None,
) -> dict[str, float]:
    """Evaluates a network on every image of a dataset, each exactly once.

    Args:
        network: a network, or the path of its weights (see `weights.load`).
        data: a folder of images, records, parquet files, WebDataset shards or tables, one such file, or a
            TFDS name; None: the validation set of the run.
        split: folder or TFDS split; None: that of the run, or 'val' or 'test'.
        data_dir: folder of TFDS datasets; None: that of the run, or TFDS's default.
        batch_size: rounded up to a multiple of the number of devices.
        on_bad: 'stop' or 'skip' at an image that cannot be decoded.
        report: called with a line for each skipped image or file, and for what had to be assumed.
        label_column: column of the labels; None: that of the run, or a usual name.
        confusion: integer array [K, K] to which the number of images of class i with the prediction j is
            added at [i, j]; see `analysis.confusion`. None: not needed.

    Returns:
        'loss', 'top1', 'top5', 'mean_class_accuracy' (fractions), 'examples', and 'skipped' if images could
        not be decoded.

    Raises:
        InputError: the dataset cannot be read, or has classes that the network does not have.
    """
    network = as_network(network)
    trained_on, smoothing = _training_of(network)
    chosen = datasets.evaluation_data(trained_on, data, split, data_dir, on_bad, label_column)
    source, lines = datasets.open_source(chosen, chosen.eval_split)
    source, assumption = datasets.with_labels_of(source, network.class_names, network.model.num_classes)
    for line in filter(None, (*lines, assumption)):
        report(line)
    batch_size = sharding.round_up_to_devices(batch_size)
    mesh = sharding.make_mesh(batch_size)
    step = make_eval_step(network.model, mesh, smoothing=smoothing, mean=chosen.mean, std=chosen.std)
    variables = jax.device_put(network.variables, sharding.replicated(mesh))
    return run_evaluation(step, variables, source, chosen, mesh, batch_size, report, confusion=confusion)


def _training_of(network: Network) -> tuple[DataConfig, float]:
    """Returns the data that a network was trained on, with its preprocessing, and the label smoothing."""
    stored = network.source.config
    config = dataclasses.asdict(Config()) if stored is None else stored
    preprocessing = {**dataclasses.asdict(network.preprocessing), 'eval_image_size': 0}
    with damage_as_input_error(network.source.path):
        data = DataConfig(**{**config['data'], **preprocessing})
        check_types(data, 'data')
        smoothing = config['label_smoothing']
        if not 0 <= smoothing < 1:
            raise InputError(f'label_smoothing must be in [0, 1), got {smoothing}')
    return data, smoothing


def run_evaluation(
    eval_step: Callable[[Any, Any], metrics.Sums],
    variables: Any,
    source: Source,
    data: DataConfig,
    mesh: Mesh,
    batch_size: int,
    report: Callable[[str], None],
    stop: Callable[[], bool] | None = None,
    confusion: np.ndarray | None = None,
) -> dict[str, float]:
    """Evaluates variables on a whole source; returns the same as `evaluate`.

    `eval_step` is from `steps.make_eval_step`; `batch_size` is a multiple of the number of devices; `stop`
    returns whether this process wants to interrupt the evaluation.

    Raises:
        BadImageError: an image cannot be decoded (`data.on_bad` 'stop'), too many cannot, or none can.
        Interrupted: a process wanted to interrupt; all processes stop at the same batch.
    """
    requests = None if stop is None else lambda: (stop(),)
    feed = inputs.Feed(inputs.eval_batches(data, source, batch_size), mesh, requests)
    total = pipeline.num_eval_batches(len(source), batch_size)
    sums = []
    hide = not (sys.stderr.isatty() and jax.process_index() == 0)
    try:
        for batch in tqdm(feed, total=total, desc='evaluation', unit='batch', leave=False, disable=hide):
            if sums and stop is not None and jax.device_get(sums[-1]['requests']).any():
                raise Interrupted
            sums.append(eval_step(variables, batch))
    finally:
        feed.close()
    for index in feed.bad:
        report(f'skipped: {pipeline.bad_image_message(source, index, data.preprocessing.channels)}')
    counted = jax.device_get(sums)
    added = {k: sum(float(s[k]) for s in counted) for k in ('loss', 'top1', 'top5', 'count')}
    if not added['count']:
        raise BadImageError(f'none of the {len(source)} images of the evaluation can be decoded')
    skipped = len(source) - round(added['count'])  # in all processes
    if skipped > data.max_bad_images:
        raise BadImageError(
            f'{skipped} images of the evaluation cannot be decoded, more than '
            f'config.data.max_bad_images={data.max_bad_images}'
        )
    labels, decided = (np.concatenate([s[k] for s in counted]) for k in ('label', 'decision'))
    if confusion is not None:
        known = (labels >= 0) & (decided >= 0)
        np.add.at(confusion, (labels[known], decided[known]), 1)
    means = {**metrics.averages(added), 'mean_class_accuracy': metrics.mean_class_accuracy(labels, decided)}
    return {**means, 'skipped': skipped} if skipped else means
