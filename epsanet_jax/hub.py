"""Folders in the layout of Hugging Face's Hub: `save_pretrained`, `from_pretrained`."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.zoo import Preprocessing, get_variant

# What reads and writes files is imported by who calls: `import epsanet_jax` needs jax and flax alone.

_REPOSITORY = r'[\w.-]+/[\w.-]+'


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with its weights and what their use needs.

    Attributes:
        model: `model.apply(variables, images)` gives the logits.
        variables: {'params', 'batch_stats'}.
        class_names: in the order of the logits; none if they are not known.
        preprocessing: what pictures go through before.
    """

    model: EPSANet
    variables: dict[str, Any]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing


def save_pretrained(
    folder: str | os.PathLike[str],
    model: EPSANet,
    variables: Mapping[str, Any],
    class_names: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    *,
    license: str = '',
    description: str = '',
) -> None:
    """Writes config.json, model.safetensors (PyTorch's names and layouts) and a card, README.md.

    Args:
        folder: a new one.
        model: the network.
        variables: its parameters and statistics.
        class_names: in the order of the logits.
        preprocessing: None: the reference's, for ImageNet.
        license: of the weights, as the Hub names it ('mit'); left for you to fill in if not given.
        description: for the card: what the network was trained on, how well it does. Nothing is claimed
            that is not in it.

    Raises:
        InputError: the folder exists or cannot be written, or the arguments do not fit together.
    """
    from epsanet_jax.convert import to_torch
    from epsanet_jax.convert.infer import settings_of
    from epsanet_jax.training.config import DataConfig, ModelConfig
    from epsanet_jax.training.metadata import check_metadata, make_metadata

    folder = os.fspath(folder)
    if class_names and len(class_names) != model.num_classes:
        raise InputError(
            f'the model has {model.num_classes} classes, but {len(class_names)} names were given'
        )
    settings = ModelConfig(**settings_of(model))
    preprocessing = preprocessing or get_variant(settings.name).preprocessing
    metadata = make_metadata(settings, class_names, DataConfig(**dataclasses.asdict(preprocessing)))
    check_metadata(metadata, folder)  # so that what is written can be read
    write_folder(folder, to_torch(variables, model), metadata, license, description)


def from_pretrained(folder_or_repository: str | os.PathLike[str], revision: str | None = None) -> Pretrained:
    """Reads a folder that `save_pretrained` or `epsanet export` wrote, or a repository of the Hub.

    Args:
        folder_or_repository: a folder, or 'user/name' for the Hub (needs `pip install huggingface_hub`).
        revision: branch, tag or commit of the repository.

    Raises:
        InputError: there is no such thing, or its files are damaged or of another network.
    """
    from epsanet_jax.convert.hub_folder import WEIGHTS, is_hub_folder
    from epsanet_jax.training import pretrained

    folder = os.path.expanduser(folder_or_repository)
    if not os.path.isdir(folder):
        folder = _download(folder, revision)
    if not is_hub_folder(folder):
        raise InputError(f'{folder} holds no {WEIGHTS}; epsanet export CHECKPOINT FOLDER writes such folders')
    loaded = pretrained.load(folder)
    names = tuple(loaded.metadata['class_names'])
    return Pretrained(loaded.model, loaded.variables, names, preprocessing_of(loaded.metadata))


def preprocessing_of(metadata: Mapping[str, Any]) -> Preprocessing:
    """Returns the preprocessing that metadata, which know no tuples, hold."""
    shown: dict[str, Any] = metadata['preprocessing']
    return Preprocessing(**{**shown, 'mean': tuple(shown['mean']), 'std': tuple(shown['std'])})


def write_folder(
    folder: str,
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, Any],
    license: str = '',
    description: str = '',
) -> None:
    """Writes the files under a temporary name and renames the folder.

    Args:
        folder: a new one.
        state_dict: name -> array, as PyTorch has them.
        metadata: from `training.metadata.make_metadata`; the run's configuration is left out.
        license: for the card.
        description: for the card.

    Raises:
        InputError: the folder exists or cannot be written.
    """
    from epsanet_jax.convert import files, hub_folder

    if os.path.lexists(folder):
        raise InputError(f'{folder} exists; choose another name')
    metadata = {**metadata, 'config': None, 'identity': None}
    parent, name = os.path.split(os.path.abspath(folder))
    temporary = None
    try:
        temporary = tempfile.mkdtemp(dir=parent, prefix=f'{name}.tmp-')
        weights = os.path.join(temporary, hub_folder.WEIGHTS)
        files.write_safetensors(weights, state_dict, files.weights_metadata(metadata))
        texts = {
            hub_folder.CONFIG: json.dumps(hub_folder.to_config(metadata), indent=2, ensure_ascii=False)
            + '\n',
            hub_folder.CARD: _card(metadata, license, description),
        }
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
{f'license: {license}' if license else '# license: (of these weights; to be filled in)'}
---

# {name}, {metadata['model']['num_classes']} classes

{description or '(What it was trained on, how well it does and what it is for is to be filled in.)'}

An [EPSANet](https://arxiv.org/abs/2105.14447) of epsanet_jax {metadata['version']}. In JAX:

```python
import epsanet_jax

net = epsanet_jax.from_pretrained('.')  # this folder, or user/name of its repository
logits = net.model.apply(net.variables, images)  # [N, {metadata['model']['num_classes']}]
```

`images` are float32 [N, {size}, {size}, 3]: RGB pictures, the shorter side resized to {shown['resize_size']}
pixels, the centre cropped, (x / 255 - mean) / std with mean {shown['mean']} and std {shown['std']}.
`net.class_names` are the classes, if they are known.

`model.safetensors` holds PyTorch's names and layouts:

```python
import epsanet_jax, safetensors.torch
from epsanet_jax.convert.torch_model import EPSANet

network = EPSANet(epsanet_jax.from_pretrained('.').model).eval()  # images [N, 3, {size}, {size}]
network.load_state_dict(safetensors.torch.load_file('model.safetensors'))
```
"""


def _download(repository: str, revision: str | None) -> str:
    """Returns the folder of a repository's files, fetched if they are not in the Hub's cache."""
    from epsanet_jax.convert.hub_folder import CARD, CONFIG, WEIGHTS

    if not re.fullmatch(_REPOSITORY, repository):
        raise InputError(f"no such folder, and no repository 'user/name': {repository}")
    try:
        import huggingface_hub
    except ImportError as e:
        raise InputError(
            f'no such folder: {repository}; to fetch it from the Hub: pip install huggingface_hub'
        ) from e
    try:
        wanted = [CONFIG, WEIGHTS, CARD]
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as e:  # the Hub's errors are one or the other
        raise InputError(f'no such folder, and the Hub does not give {repository}: {one_line(e)}') from e
