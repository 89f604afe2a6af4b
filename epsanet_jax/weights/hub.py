"""Folders in the layout of Hugging Face's Hub: writing them, and fetching repositories."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from epsanet_jax.convert import files, hub_folder
from epsanet_jax.convert.state_dict import to_torch
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.weights.metadata import metadata_of, read_metadata, without_run
from epsanet_jax.weights.network import Network

SCHEME = 'hf://'
_REPOSITORY = r'[\w.-]+/[\w.-]+'


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
    """Writes config.json, model.safetensors (PyTorch's names and layouts) and a card, README.md.

    Args:
        folder: a new one.
        network: with its weights; or a model, followed by its variables, class names and preprocessing.
        variables: parameters and statistics of a model.
        class_names: names in the order of the model's logits.
        preprocessing: what images go through before the model; None: the reference's, for ImageNet.
        license: of the weights, as the Hub names it ('mit'); if empty, the card asks you to fill it in.
        description: for the card: what the network was trained on and how well it does. The card claims
            nothing else.

    Raises:
        InputError: the folder exists or cannot be written, or the arguments do not fit together.
    """
    folder = os.fspath(folder)
    if not isinstance(network, Network):
        if variables is None:
            raise InputError('save_pretrained needs a Network, or a model and its variables')
        network = Network(network, dict(variables), tuple(class_names), preprocessing or Preprocessing())
    classes = network.model.num_classes
    if network.class_names and len(network.class_names) != classes:
        raise InputError(f'the model has {classes} classes, but {len(network.class_names)} names were given')
    read_metadata(metadata_of(network), folder)  # so that what is written can be read
    write_folder(folder, network, license, description)


def write_folder(folder: str, network: Network, license: str = '', description: str = '') -> None:
    """Writes the files of a network under a temporary name and renames the folder.

    Args:
        folder: a new one.
        network: to write; the configuration of its run is left out.
        license: for the card.
        description: for the card.

    Raises:
        InputError: the folder exists or cannot be written.
    """
    if os.path.lexists(folder):
        raise InputError(f'{folder} exists; choose another name')
    metadata = without_run(metadata_of(network))
    parent, name = os.path.split(os.path.abspath(folder))
    temporary = None
    try:
        temporary = tempfile.mkdtemp(dir=parent, prefix=f'{name}.tmp-')
        weights = os.path.join(temporary, hub_folder.WEIGHTS)
        state_dict = to_torch(network.variables, network.model)
        files.write_safetensors(weights, state_dict, files.weights_metadata(metadata))
        config = json.dumps(hub_folder.to_config(metadata), indent=2, ensure_ascii=False)
        texts = {hub_folder.CONFIG: f'{config}\n', hub_folder.CARD: _card(metadata, license, description)}
        for file, text in texts.items():
            with open(os.path.join(temporary, file), 'w', encoding='utf-8') as f:
                f.write(text)
        os.chmod(temporary, os.stat(weights).st_mode | 0o111)  # mkdtemp's folders are for their owner alone
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
{f'license: {license}' if license else '# license: (of these weights; fill in)'}
---

# {name}, {metadata['model']['num_classes']} classes

{description or '(Fill in: what it was trained on, how well it does and what it is for.)'}

An [EPSANet](https://arxiv.org/abs/2105.14447) of epsanet_jax {metadata['version']}. In JAX:

```python
import epsanet_jax

network = epsanet_jax.load('.')  # this folder, or 'hf://owner/name'
logits = network.model.apply(network.variables, images)  # [N, {metadata['model']['num_classes']}]
```

`images` are float32 [N, {size}, {size}, 3]: RGB images with the shorter side resized to
{shown['resize_size']} pixels, cropped at the centre and normalised: (x / 255 - mean) / std with
mean {shown['mean']} and std {shown['std']}.
`network.class_names` are the names of the classes, if they are known.

`model.safetensors` holds PyTorch's names and layouts:

```python
import epsanet_jax, safetensors.torch
from epsanet_jax.convert.torch_model import EPSANet

model = EPSANet(epsanet_jax.load('.').model).eval()  # images [N, 3, {size}, {size}]
model.load_state_dict(safetensors.torch.load_file('model.safetensors'))
```
"""


def download(repository: str, revision: str | None = None) -> str:
    """Returns the folder with a repository's files, which are fetched if the Hub's cache lacks them.

    Args:
        repository: 'owner/name'.
        revision: branch, tag or commit.

    Raises:
        InputError: this is not a repository's name, huggingface_hub is missing, or the Hub has no such one.
    """
    if not re.fullmatch(_REPOSITORY, repository):
        raise InputError(f"no such folder, and not the name of a repository 'owner/name': {repository}")
    try:
        import huggingface_hub
    except ImportError as e:
        raise InputError(
            f'no such folder: {repository}; to fetch it from the Hub: pip install huggingface_hub'
        ) from e
    try:
        wanted = [hub_folder.CONFIG, hub_folder.WEIGHTS, hub_folder.CARD]
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as e:  # the Hub's errors are one or the other
        raise InputError(f'no such folder, and the Hub does not have {repository}: {one_line(e)}') from e
    if not hub_folder.is_hub_folder(folder):
        raise InputError(f'{repository} holds no {hub_folder.WEIGHTS}')
    return folder
