"""Writes folders in the layout of the Hugging Face Hub, and downloads repositories from it."""

import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from epsanet_jax.convert import files, hub_folder
from epsanet_jax.convert.state_dict import to_torch
from epsanet_jax.data.preprocessing import Preprocessing, default_preprocessing
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.weights.metadata import metadata_of, read_metadata
from epsanet_jax.weights.network import Network, without_run

SCHEME = 'hf://'


def save_pretrained(
    folder: str | os.PathLike[str],
    network: Network | EPSANet,
    variables: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    *,
    license: str = '',
    description: str = '',
) -> None:
    """Writes config.json, model.safetensors (PyTorch's names and layouts) and a model card, README.md.

    The configuration of the training run is left out, because it may contain private paths.

    Args:
        folder: a new folder.
        network: a network, or a model with the next three arguments.
        variables: {'params', 'batch_stats'} of the model.
        class_names: class names in the order of the logits.
        preprocessing: how to prepare images for the model; None: that of the reference, for ImageNet.
        license: license of the weights, as the Hub writes it ('mit'); if empty, the card has a placeholder.
        description: text for the card: the training data and the accuracy. The card states no results itself.

    Raises:
        InputError: the folder exists or cannot be written, or the arguments do not fit together.
    """
    folder = os.fspath(folder)
    if not isinstance(network, Network):
        if variables is None:
            raise InputError('save_pretrained needs a Network, or a model and its variables')
        network = Network(
            network,
            dict(variables),
            tuple(class_names),
            preprocessing or default_preprocessing(network.in_channels),
        )
    classes = network.model.num_classes
    if network.class_names and len(network.class_names) != classes:
        raise InputError(f'the model has {classes} classes, but {len(network.class_names)} names were given')
    metadata = without_run(metadata_of(network))
    read_metadata(metadata, folder)  # only valid metadata are written
    _write_folder(folder, network, metadata, _card(metadata, license, description))


def _write_folder(folder: str, network: Network, metadata: Mapping[str, Any], card: str) -> None:
    """Writes the files into a temporary folder and renames it."""
    if os.path.lexists(folder):
        raise InputError(f'{folder} exists; choose another name')
    parent, name = os.path.split(os.path.abspath(folder))
    temporary = None
    try:
        temporary = tempfile.mkdtemp(dir=parent, prefix=f'{name}.tmp-')
        weights = os.path.join(temporary, hub_folder.WEIGHTS)
        state_dict = to_torch(network.variables, network.model)
        files.write_safetensors(weights, state_dict, files.weights_metadata(metadata))
        config = json.dumps(hub_folder.to_config(metadata), indent=2, ensure_ascii=False)
        pathlib.Path(temporary, hub_folder.CONFIG).write_text(f'{config}\n', 'utf-8')
        pathlib.Path(temporary, hub_folder.CARD).write_text(card, 'utf-8')
        os.chmod(temporary, os.stat(weights).st_mode | 0o111)  # mkdtemp denies access to others
        os.rename(temporary, folder)
    except OSError as e:
        raise InputError(f'cannot write {folder}: {e.strerror or e}') from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _card(metadata: Mapping[str, Any], license: str, description: str) -> str:
    name, shown = metadata['model']['name'], metadata['preprocessing']
    size = shown['image_size']
    return f"""---
library_name: epsanet_jax
pipeline_tag: image-classification
tags:
- image-classification
- epsanet
- jax
- flax
- pytorch
{f'license: {license}' if license else '# license: (fill in the license of these weights)'}
---

# {name}, {metadata['model']['num_classes']} classes

{description or '(Fill in: training data, accuracy and intended use.)'}

An [EPSANet](https://arxiv.org/abs/2105.14447), saved by epsanet_jax {metadata['version']}. In JAX:

```python
import epsanet_jax

network = epsanet_jax.load('.')  # this folder, or 'hf://owner/name'
logits = network.model.apply(network.variables, images)  # [N, {metadata['model']['num_classes']}]
```

`images` are float32 [N, {size}, {size}, 3]: RGB images with the shorter side resized to
{shown['resize_size']} pixels, cropped at the centre and normalised: (x / 255 - mean) / std with
mean {shown['mean']} and std {shown['std']}.
`network.class_names` are the names of the classes, if known.

`model.safetensors` has PyTorch's names and layouts:

```python
import epsanet_jax, safetensors.torch
from epsanet_jax.convert.torch_model import EPSANet

model = EPSANet(epsanet_jax.load('.').model).eval()  # images [N, 3, {size}, {size}]
model.load_state_dict(safetensors.torch.load_file('model.safetensors'))
```
"""


def download(repository: str, revision: str | None = None) -> str:
    """Returns the local folder of a repository 'owner/name', after downloading it if the cache lacks it.

    Raises:
        InputError: the name is invalid, huggingface_hub is not installed, or the Hub has no such repository.
    """
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repository):
        raise InputError(f"no such folder, and not the name of a Hub repository ('owner/name'): {repository}")
    try:
        import huggingface_hub
    except ImportError as e:
        advice = 'to download it from the Hub: pip install huggingface_hub'
        raise InputError(f'no such folder: {repository}; {advice}') from e
    try:
        wanted = [hub_folder.CONFIG, hub_folder.WEIGHTS, hub_folder.CARD]
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as e:  # all errors of huggingface_hub are one of these
        raise InputError(f'no such folder, and cannot download {repository}: {one_line(e)}') from e
    if not hub_folder.is_hub_folder(folder):
        raise InputError(f'the Hub repository {repository} has no {hub_folder.WEIGHTS}')
    return folder
