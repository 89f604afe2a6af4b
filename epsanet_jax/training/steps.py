"""The training and evaluation steps: pure functions of one device's rows, and compiled global steps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from epsanet_jax.data.augment import Mixing, mix, normalize, row_keys
from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.training import sharding
from epsanet_jax.training.metrics import Sums, batch_sums, decisions
from epsanet_jax.training.state import TrainState

Batch = dict[str, jax.Array]
_DEPTH_STREAM = 17  # makes stochastic depth's random numbers independent of those of mixup and cutmix


def smoothed_targets(labels: jax.Array, num_classes: int, smoothing: float, dtype: Any) -> jax.Array:
    """Returns y (1 - e) + e / K, [N, K], for integer labels [N] and e = `smoothing`."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes, dtype=dtype), smoothing)


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Returns the cross entropy [N], in nats, against y (1 - e) + e / K.

    The reference uses this loss in training and in validation.

    Args:
        logits: [N, K].
        labels: [N], integers.
        smoothing: e, in [0, 1).
    """
    targets = smoothed_targets(labels, logits.shape[-1], smoothing, logits.dtype)
    return optax.softmax_cross_entropy(logits, targets)


def draw_keep(keys: jax.Array, rate: float, blocks: int) -> jax.Array:
    """Draws the factors [N, blocks], float32, of the residual branches for stochastic depth.

    Huang et al. (2016), arXiv:1603.09382: for each image independently, block i of B is skipped with
    probability p = rate * i / (B - 1). A branch that is kept is multiplied by 1 / (1 - p), so that evaluation
    needs no factor. `EPSANet.__call__` takes the factors as `keep`.

    Args:
        keys: [N], one key per image, from `data.augment.row_keys`.
        rate: probability that the last block is skipped, in [0, 1).
        blocks: number of blocks B.
    """
    skipped = rate * jnp.arange(blocks, dtype=jnp.float32) / jnp.float32(max(1, blocks - 1))

    def draw(key: jax.Array) -> jax.Array:
        drawn = jax.random.uniform(jax.random.fold_in(key, _DEPTH_STREAM), (blocks,), jnp.float32)
        return jnp.where(drawn >= skipped, 1 / (1 - skipped), 0)

    return jax.vmap(draw)(keys)


def update_average(average: Any, values: Any, step: jax.Array, decay: float) -> Any:
    """Returns d * average + (1 - d) * values with d = min(decay, (1 + step) / (10 + step)).

    The decay is smaller in the first steps, so that the average soon forgets the initial parameters.

    Args:
        average: tree of arrays.
        values: tree of the same structure, with the values after an update.
        step: number of updates before this one, [].
        decay: in [0, 1).
    """
    wide = jnp.result_type(float)
    grown = (1 + step.astype(wide)) / (10 + step.astype(wide))
    share = 1 - jnp.minimum(jnp.asarray(decay, wide), grown)
    return jax.tree.map(lambda a, v: a + share.astype(a.dtype) * (v - a), average, values)


def loss_and_updates(
    model: EPSANet,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    targets: jax.Array,
    keep: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Any, jax.Array, jax.Array]]:
    """Returns the mean loss of a batch in training mode; differentiate it with `has_aux=True`.

    Args:
        model: the network.
        params: its parameters.
        batch_stats: BatchNorm's running statistics.
        images: [N, H, W, 3], normalised.
        targets: [N, K], target probabilities, from `smoothed_targets`.
        keep: [N, blocks], from `draw_keep`; None: every block is kept.

    Returns:
        The loss, and (new running statistics, losses [N], logits [N, K]).
    """
    variables = {'params': params, 'batch_stats': batch_stats}
    logits, new = model.apply(variables, images, train=True, keep=keep, mutable=['batch_stats'])
    losses = optax.softmax_cross_entropy(logits, targets.astype(logits.dtype))
    return losses.mean(), (new['batch_stats'], losses, logits)


def make_train_step(
    model: EPSANet,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    smoothing: float,
    mean: Sequence[float],
    std: Sequence[float],
    microbatches: int = 1,
    mixing: Mixing | None = None,
    stochastic_depth: float = 0.0,
    ema_decay: float = 0.0,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Returns the compiled step `(state, batch) -> (state, sums)` over all devices of the mesh.

    The state is replicated and donated. The batch holds 'image' (uint8 [N, H, W, 3]) and 'label' (int32 [N]),
    with rows spread over the devices. The sums are those of `metrics.batch_sums` over all rows. The batch may
    hold 'requests' ([N, R]) of single processes; the sums then hold their sums [R] over all rows, which every
    process gets after the same step without a further reduction.

    With several microbatches the arrays are [microbatches, N / microbatches, ...]. Microbatches are computed
    one after the other and their gradients added; if each holds whole BatchNorm groups, the update is that of
    the whole batch. `mixing` needs an even number of rows on each device. Random numbers depend on `seed`,
    step and row in the global batch. With `ema_decay` the state must hold moving averages.
    """
    model = sharding.bind(model, mesh)

    def gradients(state: TrainState, batch: Batch, microbatch: jax.Array | int = 0) -> tuple[Any, Any, Sums]:
        images = normalize(batch['image'], mean, std, model.dtype)
        wide = at_least_float32(model.dtype)
        targets = smoothed_targets(batch['label'], model.num_classes, smoothing, wide)
        keys = row_keys(seed, state.step, sharding.global_rows(len(targets), microbatch))
        if mixing is not None:
            images, targets = mix(images, targets, keys, mixing.mixup_alpha, mixing.cutmix_alpha)
        keep = draw_keep(keys, stochastic_depth, sum(model.layers)) if stochastic_depth else None

        def loss_fn(params):
            return loss_and_updates(model, params, state.batch_stats, images, targets, keep)

        grads, (batch_stats, losses, logits) = jax.grad(loss_fn, has_aux=True)(state.params)
        sums = batch_sums(losses, logits, batch['label'], jnp.ones(losses.shape, bool))
        # Averaging changes, not values, leaves frozen statistics equal bit for bit.
        changes = jax.tree.map(jnp.subtract, batch_stats, state.batch_stats)
        return grads, changes, _with_requests(sums, batch)

    def local_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        if microbatches == 1:
            grads, changes, sums = gradients(state, batch)
        else:
            grads, changes, sums = _add_up(functools.partial(gradients, state), batch, microbatches)
            grads, changes = jax.tree.map(lambda a: a / microbatches, (grads, changes))
        # All devices hold the same number of rows: the mean of their means is the mean over the batch.
        grads, changes = sharding.mean((grads, changes))
        batch_stats = jax.tree.map(jnp.add, state.batch_stats, changes)
        sums = sharding.total(sums)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay:
            new = {'params': params, 'batch_stats': batch_stats}
            ema = update_average(ema, new, state.step, ema_decay)
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema), sums

    step = sharding.shard_step(local_step, mesh, replicated_args=1, microbatches=microbatches)
    copies, rows = sharding.replicated(mesh), sharding.by_rows(mesh, microbatches)
    return jax.jit(step, in_shardings=(copies, rows), out_shardings=copies, donate_argnums=0)


def make_eval_step(
    model: EPSANet, mesh: Mesh, *, smoothing: float, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any, Batch], Sums]:
    """Returns the compiled step `(variables, batch) -> sums` over all devices of the mesh.

    The batch holds 'image', 'label' and 'mask' (bool [N]); rows where the mask is false are not counted. The
    sums also hold the labels and decisions [N] of `metrics.decisions`.
    """

    def local_step(variables: Any, batch: Batch) -> Sums:
        images = normalize(batch['image'], mean, std, model.dtype)
        logits: Any = model.apply(variables, images, train=False)
        losses = smoothed_cross_entropy(logits, batch['label'], smoothing)
        sums = batch_sums(losses, logits, batch['label'], batch['mask'])
        rows = decisions(logits, batch['label'], batch['mask'])
        return {**sharding.total(_with_requests(sums, batch)), **sharding.all_rows(rows)}

    step = sharding.shard_step(local_step, mesh, replicated_args=1)
    copies, rows = sharding.replicated(mesh), sharding.by_rows(mesh)
    return jax.jit(step, in_shardings=(copies, rows), out_shardings=copies)


def _with_requests(sums: Sums, batch: Batch) -> Sums:
    return {**sums, 'requests': batch['requests'].sum(axis=0)} if 'requests' in batch else sums


def _add_up(function: Callable[[Batch, jax.Array], Any], batch: Batch, microbatches: int) -> Any:
    """Returns the sum of `function` over the microbatches (the leading axis), computed one by one."""
    numbers = jnp.arange(microbatches, dtype=jnp.int32)
    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], batch), numbers[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, microbatch: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*microbatch)), None

    return jax.lax.scan(add, zeros, (batch, numbers))[0]
