"""Evaluation: every example counted exactly once, for any batch size and number of devices."""

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from epsanet_jax.data import pipeline
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.sources import Source
from epsanet_jax.errors import Interrupted
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
    stop: Callable[[], bool] | None = None,
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
        stop: whether this process asks to give up.

    Raises:
        BadImageError: a picture cannot be decoded (`data.on_bad` 'stop'), too many cannot, or none can.
        Interrupted: a process asked to give up; all of them do, at the same batch.
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
        say(f'skipped: {pipeline.bad_image_message(source, index)}')
    counted = jax.device_get(sums)
    added = {k: sum(float(s[k]) for s in counted) for k in counted[0] if k != 'requests'}
    if not added['count']:
        raise BadImageError(f'none of the {len(source)} pictures to evaluate can be decoded')
    skipped = len(source) - round(added['count'])  # by all processes
    if skipped > data.max_bad_images:
        raise BadImageError(
            f'{skipped} pictures to evaluate cannot be decoded, more than '
            f'config.data.max_bad_images={data.max_bad_images}'
        )
    means = metrics.averages(added)
    return {**means, 'skipped': skipped} if skipped else means
