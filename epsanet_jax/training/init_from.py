"""Starts a run from other weights, or continues another training with its momentum."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from epsanet_jax.convert.momentum import momentum_from_torch, parse_sgd
from epsanet_jax.convert.state_dict import Path, flatten, from_torch
from epsanet_jax.errors import InputError, some
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.training.config import OptimizerConfig
from epsanet_jax.training.state import TrainState
from epsanet_jax.weights import Network
from epsanet_jax.weights.start import adapt_stem, fitting, replaced


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the training that a run continues has stopped.

    Attributes:
        epoch: epochs trained so far, possibly a fraction.
        last_lr: learning rate of the last update.
    """

    epoch: float
    last_lr: float

    def step(self, steps_per_epoch: float) -> int:
        """Returns the step of the new run that corresponds to the epoch."""
        return round(self.epoch * steps_per_epoch)


def read_start(network: Network, config: OptimizerConfig) -> Start:
    """Returns where a run with `init_optimizer` starts, from a network that was loaded with its checkpoint.

    Raises:
        InputError: the optimizer state or the epoch is missing, or the optimizer's settings differ.
    """
    path, content = network.source.path, network.source.checkpoint
    reason = network.source.no_optimizer
    if reason:
        raise InputError(f'--config.init_optimizer: {path} has no usable optimizer state: {reason}')
    if content is None or content.optimizer is None or content.epoch is None:
        missing = 'epoch' if content is not None and content.optimizer is not None else 'optimizer'
        raise InputError(f'--config.init_optimizer: {path} holds no {missing}')
    sgd = parse_sgd(content.optimizer)
    for field in ('momentum', 'weight_decay', 'nesterov'):
        theirs, ours = getattr(sgd, field), getattr(config, field)
        if theirs != ours:
            raise InputError(
                f'{path} was trained with {field} {theirs}, not {ours}: '
                f'set --config.optimizer.{field}={theirs}'
            )
    if not sgd.lr:
        raise InputError(f'--config.init_optimizer: {path} has the learning rate 0')
    return Start(content.epoch, sgd.lr)


@dataclasses.dataclass(frozen=True)
class InitialState:
    """The values that replace the random ones of a new state.

    Attributes:
        taken: leaves of the variables, by path.
        step: number of updates made by the training that is continued; None: a new training starts.
        momentum: momentum buffers, a tree like the parameters; None: not taken over.
        report: lines to print.
    """

    taken: Mapping[Path, jax.Array]
    step: int | None
    momentum: Any
    report: tuple[str, ...]

    def put_into(self, state: TrainState) -> TrainState:
        """Returns a new state in which these values replace the initial ones."""
        variables = replaced(state.variables, self.taken)
        state = state.replace(params=variables['params'], batch_stats=variables['batch_stats'])
        if state.ema is not None:
            state = state.replace(ema=jax.tree.map(jnp.array, variables))
        if self.step is None:
            return state
        step = jnp.asarray(self.step, jnp.int32)
        buffers = {} if self.momentum is None else {'trace': jax.tree.map(jnp.array, self.momentum)}
        opt_state = optax.tree_utils.tree_set(state.opt_state, count=step, **buffers)
        return state.replace(step=step, opt_state=opt_state)


def make_initial_state(
    network: Network,
    model: EPSANet,
    class_names: Sequence[str],
    key: jax.Array,
    step: int | None,
    momentum: bool,
    partial: bool = False,
) -> InitialState:
    """Fits the weights of a network to the model of a run.

    If the network's class names or their number differ from those of the run, in the order of the outputs,
    a new classifier is drawn with `key`; a network without class names is assumed to have the same classes.
    Without `step` only the weights are taken, otherwise the optimizer's `momentum` too if it has one. With
    `partial` only what fits is taken, see `weights.start`.

    Raises:
        InputError: the weights do not fit the model, or `step` is given and the classes differ.
    """
    content, report = network.source.checkpoint, list(network.source.notes)
    head, theirs = network.model.num_classes, list(network.class_names)
    replace = head != model.num_classes or (theirs and theirs != list(class_names))
    shown = f'{head} classes' if head != model.num_classes else f'other classes ({some(theirs, 3)})'
    if replace and step is not None:
        raise InputError(
            f'--config.init_optimizer cannot continue with other classes: the weights are for {shown}'
        )
    if replace:
        report.append(f'classifier of {shown} replaced by a new one of {model.num_classes}')
    elif not theirs:
        report.append(f'classifier of {head} classes kept: the weights come without class names')
    if partial:
        taken, lines = fitting(network, model, with_classifier=not replace)
        return InitialState(taken, None, None, (*report, *lines))
    state_dict, lines = adapt_stem(network.state_dict, model)
    report += lines
    variables = from_torch(state_dict, model, new_head=key if replace else None)
    buffers = None
    if step is not None:
        report.append(f'continues at step {step} with its momentum')
        if momentum and content is not None and content.optimizer is not None:
            buffers = momentum_from_torch(content.optimizer, content.state_dict, model)
    return InitialState(flatten(variables), step, buffers, tuple(report))
