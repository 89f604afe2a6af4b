"""The command `epsanet convert`."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from epsanet_jax.convert import files
from epsanet_jax.convert.momentum import momentum_from_torch, momentum_to_torch, parse_sgd
from epsanet_jax.convert.state_dict import as_numpy, from_torch, name_table, to_torch
from epsanet_jax.errors import InputError
from epsanet_jax.models import get_variant
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.training import loading, pretrained
from epsanet_jax.training.config import ModelConfig, build_model, model_config

VERIFIED_TO = 1e-5  # of the largest logit; float32 rounding gives about 2e-6 at 224 px
_OTHER_SUFFIXES = ('.ckpt', '.bin', '.safetensor', '.tar', '.pkl', '.h5', '.npz', '.onnx', '.tmp', '.zip')


def convert(
    src: str,
    dst: str,
    name: str | None,
    num_classes: int | None,
    step: str,
    verify: bool,
    ema: bool = True,
) -> Iterator[str]:
    """Converts weights and yields the lines of the report.

    Args:
        src: PyTorch or safetensors file, workdir or checkpoint.
        dst: .pth.tar, .pth, .pt, .safetensors, or a new folder for an Orbax checkpoint.
        name: of the model; None: found from the shapes.
        num_classes: of the classifier; one of another size is replaced by a new one.
        step: which checkpoint of a workdir.
        verify: whether to compare logits with PyTorch's before anything is written.
        ema: whether to take the moving averages where a run kept any.

    Raises:
        InputError: SRC cannot be read, does not fit the model, or DST cannot be written.
    """
    dst = dst.rstrip('/') or dst
    _check_destination(src, dst)
    if name is not None:
        get_variant(name)
    named = None if name is None else ModelConfig(name=name, num_classes=num_classes or 1000)
    weights = pretrained.read(src, step, named, ema)
    settings = _settings(weights, name, num_classes, src)
    state_dict, old = weights.content.state_dict, weights.metadata['model']['num_classes']
    replaced = num_classes is not None and num_classes != old
    metadata, content = {**weights.metadata, 'model': dataclasses.asdict(settings)}, weights.content
    if replaced:
        metadata |= {'class_names': [], 'config': None, 'identity': None}
        content = dataclasses.replace(content, optimizer=None, epoch=None, best_prec1=None)
    model = build_model(settings, settings.num_classes)
    variables = from_torch(state_dict, model, new_head=jax.random.key(0) if replaced else None)

    averaged = ', moving averages' if weights.averaged else ''
    yield f'{src}: {_kind(weights.content)}, {len(state_dict)} tensors{averaged}'
    yield f'model: {describe_settings(settings)}'
    parameters, statistics = (
        sum(leaf.size for leaf in jax.tree.leaves(variables[part])) for part in ('params', 'batch_stats')
    )
    yield f'{parameters:,} parameters and {statistics:,} BatchNorm statistics converted'
    yield from _losses(state_dict, replaced, model)
    if weights.no_optimizer:
        yield f'dropped: the optimizer state: {weights.no_optimizer}'
    epoch = weights.content.epoch or 0
    if epoch != round(epoch) and dst.lower().endswith('.pth.tar'):
        yield f'lost: epoch {epoch:.4g}: .pth.tar files hold whole ones, here {round(epoch)}'
    if settings.output_stride != 32 and dst.lower().endswith(files.TORCH_SUFFIXES):
        yield f'lost: output_stride {settings.output_stride}, which PyTorch files do not keep'
    if verify:
        yield verify_weights(state_dict, variables, model, metadata['preprocessing']['image_size'])
    content, lost = _optimizer_for(dst, content, model)
    _write(dst, variables, model, metadata, content)
    if lost or (replaced and weights.content.optimizer is not None):
        yield f'dropped: the optimizer state{lost}'
    yield f'written: {dst}'


def _check_destination(src: str, dst: str) -> None:
    if os.path.isdir(dst) or (not files.is_weights_file(dst) and os.path.exists(dst)):
        raise InputError(f'{dst} exists; choose another DST')
    if os.path.exists(src) and os.path.exists(dst) and os.path.samefile(src, dst):
        raise InputError(f'SRC and DST are the same file: {src}')
    if not os.path.isdir(os.path.dirname(os.path.abspath(dst))):
        raise InputError(f'cannot write {dst}: there is no such folder')
    suffix = os.path.splitext(dst)[1]
    if suffix.lower() in _OTHER_SUFFIXES and not files.is_weights_file(dst):
        known = ', '.join((*files.TORCH_SUFFIXES, files.SAFETENSORS_SUFFIX))
        raise InputError(
            f'{dst}: cannot write {suffix} files, only {known} or a folder (without such an ending)'
        )


def _settings(
    weights: pretrained.Weights, name: str | None, num_classes: int | None, src: str
) -> ModelConfig:
    """Returns the network's settings, found or stored with the weights, with the structure of `name`."""
    settings = model_config(weights.metadata['model'])
    if name not in (None, settings.name):
        settings = pretrained.renamed(settings, name)
    if num_classes is not None:
        settings = dataclasses.replace(settings, num_classes=num_classes)
    if not settings.num_classes:
        raise InputError(f'{src} holds no classifier; --num-classes=N draws a new one')
    return settings


def _optimizer_for(dst: str, content: files.Checkpoint, model: EPSANet) -> tuple[files.Checkpoint, str]:
    """Returns the content with the optimizer renumbered for DST, or without it and why."""
    if content.optimizer is None:
        return content, ''
    if not dst.lower().endswith('.pth.tar'):
        return (
            content,
            ', which only .pth.tar holds; train on from SRC itself with --config.init_optimizer=True',
        )
    try:
        sgd = parse_sgd(content.optimizer)
        momentum = momentum_from_torch(content.optimizer, content.state_dict, model)
    except InputError as e:
        return dataclasses.replace(content, optimizer=None), f': {e}'
    group = {k: getattr(sgd, k) for k in ('lr', 'momentum', 'weight_decay', 'nesterov')}
    return dataclasses.replace(content, optimizer=momentum_to_torch(momentum, model, group)), ''


def _kind(content: files.Checkpoint) -> str:
    parts = [f'arch {content.arch}' if content.arch else 'state dict']
    if content.epoch is not None:
        parts.append(f'epoch {content.epoch}')
    if content.optimizer is not None:
        parts.append('with optimizer state')
    return ', '.join(parts)


def describe_settings(settings: ModelConfig) -> str:
    """Returns the name of a network, its number of classes and what was changed in it."""
    default = dataclasses.asdict(ModelConfig(name=settings.name, num_classes=settings.num_classes))
    changed = {k: v for k, v in dataclasses.asdict(settings).items() if v != default[k]}
    overrides = ''.join(f', {k} {v}' for k, v in changed.items())
    return f'{settings.name}, {settings.num_classes} classes{overrides}'


def _losses(state_dict: Mapping[str, Any], replaced: bool, model: EPSANet) -> Iterator[str]:
    counters = sum(name.endswith('num_batches_tracked') for name in state_dict)
    if counters:
        yield f'dropped: {counters} batch counters (num_batches_tracked)'
    if replaced:
        old = (*getattr(state_dict.get('fc.weight'), 'shape', ()), 'no')[0]
        yield f'dropped: the classifier of {old} classes; a new one of {model.num_classes} is drawn'
    types: dict[str, set[str]] = {}
    for name, (_, leaf) in name_table(model).items():
        if name in state_dict:
            theirs = str(state_dict[name].dtype).removeprefix('torch.')
            types.setdefault(str(leaf.dtype), set()).add(theirs)
    for ours, theirs in types.items():
        if theirs - {ours}:
            yield f'converted to {ours}: tensors of type {", ".join(sorted(theirs - {ours}))}'


def verify_weights(
    state_dict: Mapping[str, Any], variables: Mapping[str, Any], model: EPSANet, size: int
) -> str:
    """Compares PyTorch's logits, with SRC's own tensors, with JAX's, and says how far they are apart."""
    try:
        import torch

        from epsanet_jax.convert.torch_model import EPSANet as TorchEPSANet
    except ImportError as e:
        raise InputError('--verify needs PyTorch: pip install torch') from e
    model = model.clone(dtype=jnp.float32, param_dtype=jnp.float32)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), dict(variables))
    images = np.random.default_rng(0).standard_normal((2, size, size, 3)).astype(np.float32)
    twin = TorchEPSANet(model).eval()
    ours = to_torch(variables, model)
    source = {k: as_numpy(state_dict[k]) if k in state_dict else v for k, v in ours.items()}
    source |= {k: ours[k] for k in ours if source[k].shape != ours[k].shape}  # a new classifier
    twin.load_state_dict({k: torch.from_numpy(np.array(v, ours[k].dtype)) for k, v in source.items()})
    with torch.no_grad():
        expected = twin(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    with jax.default_matmul_precision('highest'):
        logits = np.asarray(jax.jit(model.apply)(variables, images))
    largest = np.abs(expected).max()
    difference = np.abs(logits - expected).max() / largest
    if not difference <= VERIFIED_TO:
        raise InputError(
            f'--verify: logits differ by {difference:.1e} of the largest, {largest:.3g}; nothing was written'
        )
    return f'verified: logits of PyTorch and JAX differ by {difference:.1e} of the largest, {largest:.3g}'


def _write(
    dst: str, variables: Any, model: EPSANet, metadata: dict[str, Any], content: files.Checkpoint
) -> None:
    name = metadata['model']['name']
    if dst.lower().endswith('.pth.tar'):
        rest: dict[str, Any] = {
            'epoch': round(content.epoch or 0),
            'arch': content.arch or name,
            'best_prec1': content.best_prec1 or 0.0,
        }
        if content.optimizer is not None:
            rest['optimizer'] = content.optimizer
        files.write_torch(dst, to_torch(variables, model), rest)
    elif dst.lower().endswith(files.TORCH_SUFFIXES):
        files.write_torch(dst, to_torch(variables, model))
    elif dst.lower().endswith(files.SAFETENSORS_SUFFIX):
        files.write_safetensors(dst, to_torch(variables, model), files.weights_metadata(metadata))
    else:
        loading.save_weights(dst, variables, metadata)
