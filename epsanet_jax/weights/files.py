"""`load`: reads a network from any supported file or folder."""

import dataclasses
import json
import os
import re
from typing import Any

from epsanet_jax.convert import hub_folder
from epsanet_jax.convert.files import PACKAGE, Checkpoint, is_weights_file, read_checkpoint
from epsanet_jax.convert.infer import infer_settings
from epsanet_jax.convert.state_dict import from_torch
from epsanet_jax.data.preprocessing import default_preprocessing, preprocessing_from_json
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.settings import PYRAMID, STRUCTURE, ModelConfig, model_config
from epsanet_jax.models.zoo import build_model, get_variant
from epsanet_jax.platform import check_platform
from epsanet_jax.weights import hub
from epsanet_jax.weights.metadata import make_metadata, read_metadata
from epsanet_jax.weights.network import Network, Source


def load(
    path: str | os.PathLike[str],
    step: str = 'latest',
    ema: bool = True,
    *,
    revision: str | None = None,
    model: ModelConfig | None = None,
    ignore: str = '',
    with_checkpoint: bool = False,
) -> Network:
    """Returns the network stored at a path.

    What was taken from files of other programs, and what was not, is in `source.notes`.

    Args:
        path: a workdir, a checkpoint in it, a PyTorch or safetensors file, a folder in the layout of the
            Hugging Face Hub, or 'hf://owner/name' for a Hub repository (`pip install huggingface_hub`).
        step: which checkpoint of a workdir to read: 'latest', 'best' or a number.
        ema: whether to read the moving averages, if they were kept, instead of the weights.
        revision: branch, tag or commit of a Hub repository.
        model: the model, for files without metadata; None: inferred from the shapes.
        ignore: regular expression for names of entries of a file to leave out; '' for none.
        with_checkpoint: whether to also keep the weights under PyTorch's names and the optimizer state, for
            converting the weights or continuing their training.

    Raises:
        InputError: the path does not exist, or its content is damaged or not a network of this package.
    """
    path = os.fspath(path)
    check_platform()  # otherwise its absence would look like damage of the file
    if path.startswith(hub.SCHEME):
        path = hub.download(path.removeprefix(hub.SCHEME), revision)
    elif revision is not None:
        raise InputError(f'revision={revision} is only for Hub repositories, not for {path}')
    if not is_weights_file(path):
        from epsanet_jax.weights import orbax  # slow to import

        if ignore:
            raise InputError(f'--ignore is for files and Hub folders, not for the checkpoint {path}')
        network = orbax.load(path, step, ema, with_checkpoint)
        return network if model is None else _renamed(network, model.name)
    if step != 'latest':
        raise InputError(f'{path} has one set of weights: remove the choice of a step')
    content = read_checkpoint(path, ema=ema, ignore=ignore)
    metadata, notes = _metadata(content, path, model)
    config, class_names, preprocessing = read_metadata(metadata, path)
    if model is not None:
        config = renamed(config, model.name)
    network = build_model(config)
    try:
        variables = from_torch(content.state_dict, network)
    except InputError as e:
        raise InputError(f'{path}: {e}') from e
    metadata = {**metadata, 'model': dataclasses.asdict(config)}
    lost = content.averaged and content.optimizer is not None
    content = dataclasses.replace(content, optimizer=None if lost else content.optimizer)
    source = Source(
        path,
        averaged=content.averaged,
        metadata=metadata,
        checkpoint=content if with_checkpoint else None,
        no_optimizer='it belongs to the weights, not to their moving averages: use --no-ema' if lost else '',
        notes=(*content.notes, *notes),
    )
    return Network(network, variables, class_names, preprocessing, source)


def from_pretrained(folder_or_repository: str | os.PathLike[str], revision: str | None = None) -> Network:
    """Returns the network in a folder of `save_pretrained` or `epsanet export`, or in a Hub repository.

    Args:
        folder_or_repository: a folder, a file of weights, or 'owner/name' on the Hub (needs
            `pip install huggingface_hub`).
        revision: branch, tag or commit of the repository.

    Raises:
        InputError: the folder or repository does not exist, or its files are damaged or of another package.
    """
    folder = os.path.expanduser(folder_or_repository)
    if os.path.isfile(folder):
        return load(folder)
    if not os.path.isdir(folder):
        return load(f'{hub.SCHEME}{folder.removeprefix(hub.SCHEME)}', revision=revision)
    if not hub_folder.is_hub_folder(folder):
        raise InputError(
            f'{folder} has no {hub_folder.WEIGHTS}: write it with epsanet export CHECKPOINT FOLDER'
        )
    return load(folder)


def as_network(network: Network | str | os.PathLike[str]) -> Network:
    """Returns a given network, or loads it from a path."""
    return network if isinstance(network, Network) else load(network)


def _metadata(content: Checkpoint, path: str, model: ModelConfig | None) -> tuple[dict[str, Any], list[str]]:
    """Returns the metadata of a file, or metadata inferred from its shapes and lines on them."""
    if PACKAGE in content.metadata:
        try:
            return json.loads(content.metadata[PACKAGE]), []
        except (ValueError, RecursionError) as e:
            raise InputError(f'{path}: its metadata are damaged: {type(e).__name__}') from e
    try:
        config = infer_settings(content.state_dict)
    except InputError as e:
        if model is None:
            raise InputError(f'{path}: {e}') from e
        config = model  # `from_torch` will list every name that does not fit
    names, notes = content.class_names, _doubts(config.name, content.arch)
    if names and len(names) != config.num_classes:
        notes.append(f'{len(names)} class names do not fit {config.num_classes} classes: not used')
        names = ()
    if not config.num_classes:
        notes.append('no classifier in the file: the network returns the pooled features')
    default = default_preprocessing(config.in_channels)
    if default.channels != 3 and 'mean' not in content.preprocessing:
        notes.append(f'no mean and std in the file: {default.mean[0]} and {default.std[0]} for each channel')
    try:
        preprocessing = preprocessing_from_json({**default.to_json(), **content.preprocessing})
    except InputError as e:
        raise InputError(f'{path}: {e}') from e
    return make_metadata(config, names, preprocessing), notes


def _doubts(name: str, arch: str | None) -> list[str]:
    """Returns a line if names and shapes fit a ResNet, but the architecture may be another one."""
    if get_variant(name).middle != 'conv3x3':
        return []
    plain = re.sub(r'[^a-z0-9]', '', (arch or '').lower().split('.')[0].removeprefix('tv_'))
    if plain.rstrip('0123456789') == name.rstrip('0123456789'):
        return []
    if arch:
        what = one_line(arch, 40)
        return [f'warning: read as {name}, but the file is of {what}: the logits may be wrong']
    others = "timm's resnetaa50 and resnetblur50, Caffe's ResNet-50"
    return [
        f'read as {name}; networks with the same names ({others}) would give wrong logits: check some images'
    ]


def renamed(config: ModelConfig, name: str) -> ModelConfig:
    """Returns a configuration with the structure of another variant and the other settings unchanged."""
    if name == config.name:
        return config
    keep = {'psa_bias'} if get_variant(name).middle == 'psa' else set()
    default, reset = ModelConfig(), {*STRUCTURE, *PYRAMID, 'reduction'} - keep
    return dataclasses.replace(config, name=name, **{field: getattr(default, field) for field in reset})


def _renamed(network: Network, name: str) -> Network:
    metadata = network.source.metadata
    config = renamed(model_config(metadata['model']), name)
    model = build_model(config)
    source = dataclasses.replace(network.source, metadata={**metadata, 'model': dataclasses.asdict(config)})
    variables = from_torch(network.state_dict, model)
    return dataclasses.replace(network, model=model, variables=variables, source=source)
