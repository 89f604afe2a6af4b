"""The training and evaluation steps, as pure functions of one device's rows and as compiled global steps."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from epsanet_jax.data.augment import normalize
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.training import parallel
from epsanet_jax.training.loss import smoothed_cross_entropy
from epsanet_jax.training.metrics import Sums, batch_sums
from epsanet_jax.training.state import TrainState

Batch = dict[str, jax.Array]


def loss_and_updates(
    model: EPSANet, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array, smoothing: float
) -> tuple[jax.Array, tuple[Any, jax.Array, jax.Array]]:
    """Returns the mean loss of a batch in training mode; differentiate with `has_aux=True`.

    Args:
        model: the network.
        params: its parameters.
        batch_stats: BatchNorm's running statistics.
        images: [N, H, W, 3], normalised.
        labels: [N], integers.
        smoothing: of the labels.

    Returns:
        The loss, and (new running statistics, losses [N], logits [N, K]).
    """
    variables = {'params': params, 'batch_stats': batch_stats}
    logits, new = model.apply(variables, images, train=True, mutable=['batch_stats'])
    losses = smoothed_cross_entropy(logits, labels, smoothing)
    return losses.mean(), (new['batch_stats'], losses, logits)


def make_train_step(
    model: EPSANet,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    smoothing: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Returns the compiled step `(state, batch) -> (state, sums)` over all devices of the mesh.

    The state is replicated and donated; the batch holds 'image' (uint8 [N, H, W, 3]) and 'label' (int32
    [N]), its rows spread over the devices. The sums are those of `metrics.batch_sums` over all rows.
    """
    model = parallel.bind(model, mesh)

    def local_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        images = normalize(batch['image'], mean, std, model.dtype)

        def loss_fn(params):
            return loss_and_updates(model, params, state.batch_stats, images, batch['label'], smoothing)

        grads, (batch_stats, losses, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
        # Every device holds as many rows, so the mean of the devices' means is the mean over the batch.
        grads, batch_stats = parallel.mean((grads, batch_stats))
        sums = parallel.total(batch_sums(losses, logits, batch['label'], jnp.ones(losses.shape, bool)))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), sums

    step = parallel.shard_step(local_step, mesh, replicated_args=1)
    copies, rows = parallel.replicated(mesh), parallel.by_rows(mesh)
    return jax.jit(step, in_shardings=(copies, rows), out_shardings=copies, donate_argnums=0)


def make_eval_step(
    model: EPSANet, mesh: Mesh, *, smoothing: float, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any, Batch], Sums]:
    """Returns the compiled step `(variables, batch) -> sums` over all devices of the mesh.

    The batch holds 'image', 'label' and 'mask' (bool [N]); only rows where the mask is true are counted.
    """

    def local_step(variables: Any, batch: Batch) -> Sums:
        images = normalize(batch['image'], mean, std, model.dtype)
        logits: Any = model.apply(variables, images, train=False)
        losses = smoothed_cross_entropy(logits, batch['label'], smoothing)
        return parallel.total(batch_sums(losses, logits, batch['label'], batch['mask']))

    step = parallel.shard_step(local_step, mesh, replicated_args=1)
    copies, rows = parallel.replicated(mesh), parallel.by_rows(mesh)
    return jax.jit(step, in_shardings=(copies, rows), out_shardings=copies)
