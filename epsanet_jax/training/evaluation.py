"""Evaluation: every example counted exactly once, for any batch size and number of devices."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from epsanet_jax.data import pipeline
from epsanet_jax.data.sources import Source
from epsanet_jax.errors import InputError
from epsanet_jax.training import inputs, metrics
from epsanet_jax.training.config import DataConfig


def evaluate(
    eval_step: Callable[[Any, Any], metrics.Sums],
    variables: Any,
    source: Source,
    data: DataConfig,
    mesh: Mesh,
    batch_size: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Returns 'loss', 'top1', 'top5' (fractions), 'examples', and 'skipped' if pictures were not decodable.

    Args:
        eval_step: from `steps.make_eval_step`.
        variables: for the model.
        source: to be evaluated whole.
        data: size, resize, and how to read.
        mesh: on whose devices.
        batch_size: of the global batch; divides among the devices.
        say: told of every picture skipped.

    Raises:
        InputError: a picture cannot be decoded (`data.on_bad` 'stop'), or none can.
    """
    feed = inputs.Feed(inputs.eval_batches(data, source, batch_size), mesh)
    total = pipeline.num_eval_batches(len(source), batch_size)
    sums = []
    hide = not (sys.stderr.isatty() and jax.process_index() == 0)
    try:
        for batch in tqdm(feed, total=total, desc='evaluation', unit='batch', leave=False, disable=hide):
            sums.append(eval_step(variables, batch))
    finally:
        feed.close()
    for index in feed.bad:
        say(f'skipped: {pipeline.bad_image_message(source, index)}')
    added = {k: sum(float(s[k]) for s in jax.device_get(sums)) for k in sums[0]}
    if not added['count']:
        raise InputError(f'none of the {len(source)} pictures to evaluate can be decoded')
    means = metrics.averages(added)
    return {**means, 'skipped': len(feed.bad)} if feed.bad else means
