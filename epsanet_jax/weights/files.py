"""`load`: reads a network from any supported file or folder."""

import dataclasses
import json
import os
from typing import Any

from epsanet_jax.convert import hub_folder
from epsanet_jax.convert.files import PACKAGE, Checkpoint, is_weights_file, read_checkpoint
from epsanet_jax.convert.infer import infer_settings
from epsanet_jax.convert.state_dict import from_torch, strip_prefix
from epsanet_jax.data.preprocessing import default_preprocessing
from epsanet_jax.errors import InputError
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
    with_checkpoint: bool = False,
) -> Network:
    """Returns the network stored at a path.

    Args:
        path: a workdir, a checkpoint in it, a PyTorch or safetensors file, a folder in the layout of the
            Hugging Face Hub, or 'hf://owner/name' for a Hub repository (`pip install huggingface_hub`).
        step: which checkpoint of a workdir to read: 'latest', 'best' or a number.
        ema: whether to read the moving averages, if the run kept them, instead of the weights.
        revision: branch, tag or commit of a Hub repository.
        model: the model, for files without metadata; None: inferred from the shapes.
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

        network = orbax.load(path, step, ema, with_checkpoint)
        return network if model is None else _renamed(network, model.name)
    if step != 'latest' or not ema:
        raise InputError(
            f'{path} has one set of weights: remove the choice of a step or of no moving averages'
        )
    content = read_checkpoint(path)
    content = dataclasses.replace(content, state_dict=strip_prefix(content.state_dict))
    metadata = _metadata(content, path, model)
    config, class_names, preprocessing = read_metadata(metadata, path)
    if model is not None:
        config = renamed(config, model.name)
    network = build_model(config)
    try:
        variables = from_torch(content.state_dict, network)
    except InputError as e:
        raise InputError(f'{path}: {e}') from e
    metadata = {**metadata, 'model': dataclasses.asdict(config)}
    source = Source(path, metadata=metadata, checkpoint=content if with_checkpoint else None)
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


def _metadata(content: Checkpoint, path: str, model: ModelConfig | None) -> dict[str, Any]:
    """Returns the metadata of a file, or metadata inferred from its shapes."""
    if PACKAGE in content.metadata:
        try:
            return json.loads(content.metadata[PACKAGE])
        except (ValueError, RecursionError) as e:
            raise InputError(f'{path}: its metadata are damaged: {type(e).__name__}') from e
    try:
        config = infer_settings(content.state_dict)
    except InputError as e:
        if model is None:
            raise InputError(f'{path}: {e}') from e
        config = model  # `from_torch` will list every name that does not fit
    return make_metadata(config, (), default_preprocessing(config.in_channels))


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
