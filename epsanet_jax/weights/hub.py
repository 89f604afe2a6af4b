"""Writes folders in the layout of the Hugging Face Hub, and moves them from it and to it."""

import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from epsanet_jax.convert import files, hub_folder
from epsanet_jax.errors import InputError, one_line

SCHEME = 'hf://'
_NAME = re.compile(r'[\w.-]+/[\w.-]+')


def write_folder(
    folder: str, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, Any], card: str
) -> None:
    """Writes config.json, model.safetensors and README.md into a temporary folder and renames it.

    Raises:
        InputError: the folder exists or cannot be written.
    """
    if os.path.lexists(folder):
        raise InputError(f'{folder} exists; choose another name')
    parent, name = os.path.split(os.path.abspath(folder))
    temporary = None
    try:
        temporary = tempfile.mkdtemp(dir=parent, prefix=f'{name}.tmp-')
        weights = os.path.join(temporary, hub_folder.WEIGHTS)
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


def make_card(metadata: Mapping[str, Any], license: str, description: str) -> str:
    """Returns the text of a model card, README.md."""
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
    if not _NAME.fullmatch(repository):
        raise InputError(f"no such folder, and not the name of a Hub repository ('owner/name'): {repository}")
    library = _library(f'no such folder: {repository}; to download it from the Hub')
    try:
        wanted = [hub_folder.CONFIG, hub_folder.CARD, hub_folder.WEIGHTS, hub_folder.INDEX, hub_folder.PARTS]
        folder = library.snapshot_download(repository, revision=revision, allow_patterns=wanted)
        if not hub_folder.is_hub_folder(folder):
            wanted = [hub_folder.CONFIG, hub_folder.CARD, hub_folder.TORCH]
            folder = library.snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as e:  # all errors of huggingface_hub are one of these
        raise InputError(f'no such folder, and cannot download {repository}: {one_line(e)}') from e
    if not hub_folder.is_hub_folder(folder):
        raise InputError(f'the Hub repository {repository} has no {hub_folder.WEIGHTS}')
    return folder


def upload(folder: str, repository: str, private: bool, keep_card: bool) -> str:
    """Uploads a folder as one commit, and creates the repository 'owner/name' if it does not exist.

    Args:
        folder: the folder.
        repository: 'owner/name'.
        private: whether a repository that is created is private.
        keep_card: whether to keep the README.md of the repository if it has one.

    Returns:
        The address of the commit.

    Raises:
        InputError: the name is invalid, huggingface_hub is not installed, or the Hub refuses the upload.
    """
    if not _NAME.fullmatch(repository):
        raise InputError(f"not the name of a Hub repository ('owner/name'): {repository}")
    api = _library('to upload to the Hub').HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        kept = [hub_folder.CARD] if keep_card and api.file_exists(repository, hub_folder.CARD) else None
        commit = api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=kept)
    except (OSError, ValueError) as e:
        raise InputError(f'cannot upload to {repository}: {one_line(e)}') from e
    return str(commit.commit_url)


def _library(purpose: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as e:
        raise InputError(f'{purpose}: pip install huggingface_hub') from e
    return huggingface_hub
