"""Weights of any kind of file, and runs that start from them."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from epsanet_jax.convert.files import Checkpoint, is_weights_file, read_checkpoint
from epsanet_jax.convert.infer import STRUCTURE, infer_settings
from epsanet_jax.convert.momentum import momentum_from_torch, momentum_to_torch, parse_sgd
from epsanet_jax.convert.state_dict import from_torch, strip_prefix, to_torch
from epsanet_jax.errors import InputError, some
from epsanet_jax.models import get_variant
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.training import loading
from epsanet_jax.training.config import DataConfig, ModelConfig, OptimizerConfig, build_model, model_config
from epsanet_jax.training.metadata import check_metadata, make_metadata
from epsanet_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights under PyTorch's names, whatever they were read from.

    Attributes:
        content: state dict and, from a run or a training script, its optimiser and epoch.
        metadata: from `metadata.make_metadata`.
        step: at which a run saved them, else 0.
        averaged: whether they are a run's moving averages.
        no_optimizer: why a run's optimizer state does not come along; '' if it does, or if there is no run.
    """

    content: Checkpoint
    metadata: dict[str, Any]
    step: int = 0
    averaged: bool = False
    no_optimizer: str = ''


def read(path: str, step: str = 'latest', model: ModelConfig | None = None, ema: bool = True) -> Weights:
    """Reads a PyTorch or safetensors file, a workdir or an Orbax checkpoint.

    Args:
        path: of the file or folder.
        step: which checkpoint of a workdir.
        model: the network of a weights file that says nothing about it, instead of what its shapes say.
        ema: whether to take the moving averages where a run kept any; without the optimizer's state, which
            is not theirs.

    Raises:
        InputError: there is no such thing, or it is damaged, or of another network.
    """
    _check_choice(path, step, ema)
    if not is_weights_file(path):
        return _from_orbax(loading.load(path, step, with_momentum=True, ema=ema))
    content = read_checkpoint(path)
    content = dataclasses.replace(content, state_dict=strip_prefix(content.state_dict))
    if 'epsanet_jax' in content.metadata:
        try:
            metadata = json.loads(content.metadata['epsanet_jax'])
        except (ValueError, RecursionError) as e:
            raise InputError(f'{path}: its metadata are damaged: {type(e).__name__}') from e
        return Weights(content, check_metadata(metadata, path))
    try:
        settings = ModelConfig(**infer_settings(content.state_dict))
    except InputError as e:
        if model is None:
            raise InputError(f'{path}: {e}') from e
        settings = model  # what does not fit it is then told name by name
    if model is not None:
        settings = renamed(settings, model.name)
    preprocessing = dataclasses.asdict(get_variant(settings.name).preprocessing)
    return Weights(content, make_metadata(settings, (), DataConfig(**preprocessing)))


def load(path: str, step: str = 'latest', ema: bool = True) -> loading.Loaded:
    """Reads weights of any kind for use; see `read`."""
    if not is_weights_file(path):
        return loading.load(path, step, ema=ema)
    weights = read(path, step, ema=ema)
    model = model_of(weights)
    return loading.Loaded(model, from_torch(weights.content.state_dict, model), weights.metadata, 0)


def _check_choice(path: str, step: str, ema: bool) -> None:
    if is_weights_file(path) and (step != 'latest' or not ema):
        raise InputError(f'{path} holds one set of weights: no step and no moving averages to choose from')


def renamed(settings: ModelConfig, name: str) -> ModelConfig:
    """Returns settings with the structure of the network of that name."""
    psa_bias = settings.psa_bias and get_variant(name).middle == 'psa'
    structure = {field: getattr(ModelConfig(), field) for field in (*STRUCTURE, 'reduction')}
    return dataclasses.replace(settings, name=name, psa_bias=psa_bias, **structure)


def model_of(weights: Weights) -> EPSANet:
    """Makes the network that weights are of."""
    settings = model_config(weights.metadata['model'])
    return build_model(settings, settings.num_classes)


def _from_orbax(loaded: loading.Loaded) -> Weights:
    config, optimizer = loaded.metadata['config'], None
    reason = _no_optimizer(loaded)
    if loaded.momentum is not None and config is not None and not reason:
        group = {k: config['optimizer'][k] for k in ('momentum', 'weight_decay', 'nesterov')}
        group['lr'] = loaded.metadata.get('lr', config['optimizer']['lr'])
        optimizer = momentum_to_torch(loaded.momentum, loaded.model, group)
    content = Checkpoint(
        to_torch(loaded.variables, loaded.model),
        epoch=loaded.metadata.get('epoch'),
        optimizer=optimizer,
        arch=loaded.metadata['model']['name'],
    )
    return Weights(content, loaded.metadata, loaded.step, loaded.averaged, reason)


def _no_optimizer(loaded: loading.Loaded) -> str:
    """Returns why the optimizer's state of a run is none that PyTorch's SGD can go on from, or ''."""
    config = loaded.metadata['config']
    if config is None:
        return ''
    optimizer = config['optimizer']
    if loaded.averaged:
        return 'it is of the weights themselves, not of their moving averages (--no-ema)'
    if optimizer.get('name', 'sgd') != 'sgd':
        return f'it is of {optimizer["name"]}'
    if config.get('freeze'):
        return f'parameters are frozen ({config["freeze"]})'
    if not optimizer.get('decay_norm_and_bias', True):
        return 'weight decay leaves out BatchNorm and biases'
    return ''


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts that goes on from another's optimiser.

    Attributes:
        epoch: epochs trained so far; need not be whole.
        last_lr: the learning rate of its last update.
    """

    epoch: float
    last_lr: float

    def step(self, steps_per_epoch: float) -> int:
        """Returns the number of steps that the training so far is in the run that goes on."""
        return round(self.epoch * steps_per_epoch)


def read_start(content: Checkpoint, path: str, config: OptimizerConfig) -> Start:
    """Returns where a run with `config.init_optimizer` starts.

    Raises:
        InputError: the file has no optimiser or epoch, or was trained with other settings.
    """
    if content.optimizer is None or content.epoch is None:
        missing = 'optimizer' if content.optimizer is None else 'epoch'
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
class Initial:
    """What a fresh state starts with instead of random parameters.

    Attributes:
        variables: parameters and statistics.
        step: updates made by the training that goes on here; None: this is a new one.
        momentum: its buffers, a tree like the parameters; None: not taken over.
        said: what the user is to be told.
    """

    variables: dict[str, Any]
    step: int | None
    momentum: Any
    said: tuple[str, ...]

    def put_into(self, state: TrainState) -> TrainState:
        """Returns a fresh state with this in place of its own."""
        state = state.replace(params=self.variables['params'], batch_stats=self.variables['batch_stats'])
        if state.ema is not None:
            state = state.replace(ema=jax.tree.map(jnp.array, dict(self.variables)))
        if self.step is None:
            return state
        step = jnp.asarray(self.step, jnp.int32)
        opt_state = optax.tree_utils.tree_set(state.opt_state, count=step)
        if self.momentum is not None:
            momentum = jax.tree.map(jnp.array, self.momentum)
            opt_state = optax.tree_utils.tree_set(opt_state, trace=momentum)
        return state.replace(step=step, opt_state=opt_state)


def make_initial(
    weights: Weights,
    model: EPSANet,
    class_names: Sequence[str],
    key: jax.Array,
    step: int | None,
    momentum: bool,
) -> Initial:
    """Fits weights to the model of a run.

    Args:
        weights: to start from.
        model: the network.
        class_names: of the run, in the order of the outputs. Where the weights' classes are others, or of
            another number, the classifier is drawn anew; weights that name none are taken to have the same.
        key: random key, for that.
        step: the step to start at; None: weights alone are taken.
        momentum: with `step`: whether the optimizer has momentum to take over.

    Raises:
        InputError: the weights do not fit.
    """
    content, said = weights.content, []
    head = (*getattr(content.state_dict.get('fc.weight'), 'shape', ()), 0)[0]
    theirs = list(weights.metadata['class_names'])
    replace = head != model.num_classes or (theirs and theirs != list(class_names))
    shown = f'{head} classes' if head != model.num_classes else f'other classes ({some(theirs, 3)})'
    if replace and step is not None:
        raise InputError(
            f'--config.init_optimizer cannot go on with other classes: the weights are of {shown}'
        )
    if replace:
        said.append(f'classifier of {shown} replaced by a new one of {model.num_classes}')
    elif not theirs:
        said.append(f'classifier of {head} classes kept: the weights do not say which')
    variables = from_torch(content.state_dict, model, new_head=key if replace else None)
    buffers = None
    if step is not None:
        said.append(f'continues at step {step} with its momentum')
        if momentum and content.optimizer is not None:
            buffers = momentum_from_torch(content.optimizer, content.state_dict, model)
    return Initial(variables, step, buffers, tuple(said))
