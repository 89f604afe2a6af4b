"""Converts weights between file types, and compares logits with PyTorch."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from epsanet_jax.convert import files
from epsanet_jax.convert.momentum import momentum_from_torch, momentum_to_torch, parse_sgd
from epsanet_jax.convert.state_dict import as_numpy, name_table, to_torch
from epsanet_jax.errors import InputError
from epsanet_jax.models import ModelConfig, get_variant
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.paths import check_free
from epsanet_jax.weights.files import load
from epsanet_jax.weights.network import Network, metadata_of, with_new_classifier, without_run

VERIFIED_TO = 1e-5  # relative to the largest logit; float32 rounding gives about 2e-6 at 224 px
_OTHER_SUFFIXES = ('.ckpt', '.bin', '.safetensor', '.tar', '.pkl', '.h5', '.npz', '.onnx', '.tmp', '.zip')


def convert(
    src: str | Network,
    dst: str,
    name: str | None = None,
    num_classes: int | None = None,
    step: str = 'latest',
    verify: bool = False,
    ema: bool = True,
    overwrite: bool = False,
    ignore: str = '',
    report: Callable[[str], object] = str,
) -> Iterator[str]:
    """Converts weights and yields the lines of a report.

    Args:
        src: a network, or the path of its weights, see `load`.
        dst: a .pth.tar, .pth, .pt or .safetensors file, or a new folder for an Orbax checkpoint.
        name: name of the model; None: from the metadata or the shapes.
        num_classes: number of classes; a classifier of another size is replaced by a new one.
        step: which checkpoint of a workdir to read: 'latest', 'best' or a number.
        verify: whether to compare logits with PyTorch before writing.
        ema: whether to read the moving averages, if they were kept.
        overwrite: whether to replace an existing file `dst`.
        ignore: regular expression for names of entries of `src` to leave out; '' for none.
        report: called with each line of `Source.notes`.

    Raises:
        InputError: `src` cannot be read or does not fit the model, or `dst` cannot be written.
    """
    dst = dst.rstrip('/') or dst
    src_name = src.source.path if isinstance(src, Network) else src
    _check_destination(src_name, dst, overwrite)
    if name is not None:
        get_variant(name)
    if isinstance(src, Network):
        network = src
    else:
        named = None if name is None else ModelConfig(name=name, num_classes=num_classes or 1000)
        network = load(src, step, ema, model=named, ignore=ignore, with_checkpoint=True)
    content, old = network.checkpoint, network.model.num_classes
    if not (num_classes or old):
        raise InputError(f'{src_name} has no classifier: use --num-classes=N to draw a new one')
    for note in () if isinstance(src, Network) else network.source.notes:
        report(note)
    replaced = num_classes is not None and num_classes != old
    if replaced:
        network = with_new_classifier(network, num_classes or 0, jax.random.key(0))
    averaged = ', moving averages' if network.source.averaged else ''
    yield f'{src_name}: {_kind(content)}, {len(content.state_dict)} tensors{averaged}'
    yield f'model: {describe_model(network)}'
    yield from _report(network, content, dst, replaced)
    if verify:
        yield verify_weights(network, content.state_dict)
    written, lost = _optimizer_for(dst, network.checkpoint, network.model)
    write(dst, network, written)
    if lost or (replaced and content.optimizer is not None):
        yield f'dropped: the optimizer state{lost}'
    yield f'written: {dst}'


def _report(network: Network, content: files.Checkpoint, dst: str, replaced: bool) -> Iterator[str]:
    """Yields lines on what is converted, and on what `dst` cannot store."""
    model = network.model
    sizes = {k: sum(leaf.size for leaf in jax.tree.leaves(tree)) for k, tree in network.variables.items()}
    yield f'{sizes["params"]:,} parameters and {sizes["batch_stats"]:,} BatchNorm statistics converted'
    counters = sum(name.endswith('num_batches_tracked') for name in content.state_dict)
    if counters:
        yield f'dropped: {counters} batch counters (num_batches_tracked)'
    if replaced:
        old = (*getattr(content.state_dict.get('fc.weight'), 'shape', ()), 'no')[0]
        yield f'dropped: the classifier of {old} classes; a new one of {model.num_classes} classes is drawn'
    yield from _changed_types(content.state_dict, model)
    if network.source.no_optimizer:
        yield f'dropped: the optimizer state: {network.source.no_optimizer}'
    epoch = content.epoch or 0
    if epoch != round(epoch) and dst.lower().endswith('.pth.tar'):
        yield f'lost: epoch {epoch:.4g}: .pth.tar files store whole epochs, here {round(epoch)}'


def _check_destination(src: str, dst: str, overwrite: bool) -> None:
    if os.path.exists(src) and os.path.exists(dst) and os.path.samefile(src, dst):
        raise InputError(f'SRC and DST are the same file: {src}')
    check_free([dst], overwrite, 'DST')
    if not os.path.isdir(os.path.dirname(os.path.abspath(dst))):
        raise InputError(f'cannot write {dst}: its folder does not exist')
    suffix = os.path.splitext(dst)[1]
    if suffix.lower() in _OTHER_SUFFIXES and not files.has_weights_suffix(dst):
        known = ', '.join(files.SUFFIXES)
        raise InputError(f'{dst}: cannot write {suffix} files, only {known} or a folder (without a suffix)')


def _optimizer_for(dst: str, content: files.Checkpoint, model: EPSANet) -> tuple[files.Checkpoint, str]:
    """Returns the content with the optimizer state for `dst`, and why that state is dropped or ''."""
    if content.optimizer is None:
        return content, ''
    if not dst.lower().endswith('.pth.tar'):
        advice = 'to continue training, use SRC with --config.init_optimizer=True'
        return content, f', which only .pth.tar files store; {advice}'
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


def describe_model(network: Network) -> str:
    """Returns the name of a network, its number of classes and its differences from that variant."""
    settings = metadata_of(network)['model']
    default = dataclasses.asdict(ModelConfig(name=settings['name'], num_classes=settings['num_classes']))
    changed = ''.join(f', {k} {v}' for k, v in settings.items() if v != default[k])
    return f'{settings["name"]}, {settings["num_classes"]} classes{changed}'


def _changed_types(state_dict: Mapping[str, Any], model: EPSANet) -> Iterator[str]:
    types: dict[str, set[str]] = {}
    for name, (_, leaf) in name_table(model).items():
        if name in state_dict:
            stored = str(state_dict[name].dtype).removeprefix('torch.')
            types.setdefault(str(leaf.dtype), set()).add(stored)
    for dtype, stored in types.items():
        if other := sorted(stored - {dtype}):
            yield f'converted to {dtype}: tensors of type {", ".join(other)}'


def verify_weights(network: Network, state_dict: Mapping[str, Any]) -> str:
    """Compares the logits of JAX for two images with those of PyTorch for a state dict; returns a line.

    Raises:
        InputError: PyTorch is not installed, or the logits differ.
    """
    try:
        import torch

        from epsanet_jax.convert.torch_model import EPSANet as TorchEPSANet
    except ImportError as e:
        raise InputError('--verify needs PyTorch: pip install torch') from e
    size = network.preprocessing.image_size
    model = network.model.clone(dtype='float32', param_dtype='float32')
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), dict(network.variables))
    images = np.random.default_rng(0).standard_normal((2, size, size, model.in_channels)).astype(np.float32)
    twin = TorchEPSANet(model).eval()
    ours = to_torch(variables, model)
    source = {k: as_numpy(state_dict[k]) if k in state_dict else v for k, v in ours.items()}
    source |= {k: ours[k] for k in ours if source[k].shape != ours[k].shape}  # a new classifier
    twin.load_state_dict({k: torch.from_numpy(np.array(v, np.float32)) for k, v in source.items()})
    with torch.no_grad():
        expected = twin(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    with jax.default_matmul_precision('highest'):
        logits = np.asarray(jax.jit(model.apply)(variables, images))
    return compare('PyTorch and JAX', logits, expected, VERIFIED_TO)


def compare(names: str, logits: np.ndarray, expected: np.ndarray, limit: float) -> str:
    """Returns a line with the largest difference of logits, relative to the largest logit.

    Raises:
        InputError: the difference exceeds `limit`.
    """
    largest = np.abs(expected).max()
    difference = np.abs(logits - expected).max() / largest
    shown = f'logits of {names} differ by {difference:.1e} of the largest, {largest:.3g}'
    if not difference <= limit:
        raise InputError(f'--verify: {shown}; nothing was written')
    return f'verified: {shown}'


def write(dst: str, network: Network, content: files.Checkpoint | None = None) -> None:
    """Writes a network to a file, whose type is given by its suffix, or as an Orbax checkpoint.

    Args:
        dst: a .pth.tar, .pth, .pt or .safetensors file, or a new folder for an Orbax checkpoint.
        network: the network.
        content: epoch, arch, best top-1 and optimizer state for .pth.tar files.

    Raises:
        InputError: `dst` cannot be written.
    """
    lower, metadata = dst.lower(), metadata_of(network)
    state_dict = to_torch(network.variables, network.model)
    if lower.endswith('.pth.tar'):
        content = content or files.Checkpoint({})
        rest: dict[str, Any] = {
            'epoch': round(content.epoch or 0),
            'arch': content.arch or metadata['model']['name'],
            'best_prec1': content.best_prec1 or 0.0,
        }
        if content.optimizer is not None:
            rest['optimizer'] = content.optimizer
        files.write_torch(dst, state_dict, rest, without_run(metadata))
    elif lower.endswith(files.TORCH_SUFFIXES):
        files.write_torch(dst, state_dict, metadata=without_run(metadata))
    elif lower.endswith(files.SAFETENSORS_SUFFIX):
        files.write_safetensors(dst, state_dict, files.weights_metadata(metadata))
    else:
        from epsanet_jax.weights import orbax  # slow to import

        orbax.save_weights(dst, network.variables, metadata)
