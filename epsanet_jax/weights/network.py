"""`Network`: a model with its weights and everything needed to use them."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from epsanet_jax.convert.contents import Checkpoint
from epsanet_jax.convert.state_dict import draw_classifier, to_jax_layout, to_torch
from epsanet_jax.data.classes import distinct
from epsanet_jax.data.preprocessing import Preprocessing, default_preprocessing
from epsanet_jax.errors import InputError
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.settings import ModelConfig, model_config, settings_of
from epsanet_jax.models.zoo import build_model, config_of
from epsanet_jax.weights import hub
from epsanet_jax.weights.metadata import make_metadata, read_metadata


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights of a network come from.

    Attributes:
        path: file or folder of the weights; '' for weights made in memory.
        step: training step of the weights; 0 if they are not from a training run.
        averaged: whether the weights are the moving averages of a training run.
        metadata: everything stored with the weights, see `weights.metadata`.
        checkpoint: the same weights under PyTorch's names, with optimizer state and epoch; only with
            `load(..., with_checkpoint=True)`.
        notes: what was taken from a file of another program and what was not, a line each.
        no_optimizer: why `checkpoint` lacks the optimizer state of a training run; otherwise ''.
    """

    path: str = ''
    step: int = 0
    averaged: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    no_optimizer: str = ''
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any] | None:
        """The configuration of the training run, as nested dicts; None without a run."""
        return self.metadata.get('config')


@dataclasses.dataclass(frozen=True)
class Network:
    """A model with its weights and everything needed to use them.

    Attributes:
        model: the model; `model.apply(variables, images)` returns logits.
        variables: {'params', 'batch_stats'}.
        class_names: class names in the order of the logits, given as any sequence of strings or integers;
            empty if unknown.
        preprocessing: how to prepare images for the model.
        source: where the weights come from.
    """

    model: EPSANet
    variables: dict[str, Any]
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    source: Source = dataclasses.field(default_factory=Source)

    def __post_init__(self):
        # scikit-learn's LabelEncoder has an array of names or of integers.
        if wrong := [name for name in self.class_names if not isinstance(name, str | int | np.integer)]:
            raise InputError(f'class_names must be strings or integers, got {wrong[0]!r}')
        object.__setattr__(self, 'class_names', tuple(str(name) for name in self.class_names))

    @property
    def labels(self) -> list[str]:
        """A name for each output, all different: the class names or, if they are unknown, the numbers."""
        return distinct(self.class_names) or [str(i) for i in range(self.model.num_classes)]

    @property
    def state_dict(self) -> Mapping[str, Any]:
        """The weights under PyTorch's names: the original tensors if they were kept, otherwise converted."""
        return self.checkpoint.state_dict

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights under PyTorch's names, with optimizer state and epoch if they were kept."""
        return self.source.checkpoint or Checkpoint(to_torch(self.variables, self.model))

    def push_to_hub(
        self, repository: str, *, private: bool = False, license: str = '', description: str = ''
    ) -> str:
        """Uploads the network to the Hugging Face Hub (`pip install huggingface_hub`, then `hf auth login`).

        The files are those of `save_pretrained`. A model card that the repository has already is kept, unless
        a license or a description is given.

        Args:
            repository: 'owner/name'; it is created if it does not exist.
            private: whether a repository that is created is private.
            license: license of the weights, as the Hub writes it ('mit').
            description: text for the card: the training data and the accuracy.

        Returns:
            The address of the commit.

        Raises:
            InputError: huggingface_hub is not installed, or the Hub refuses the upload.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = os.path.join(parent, 'network')
            save_pretrained(folder, self, license=license, description=description)
            return hub.upload(folder, repository, private, keep_card=not (license or description))


def without_run(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns metadata without the configuration of the run, which may contain private paths."""
    return {**metadata, 'config': None, 'identity': None}


def with_new_classifier(network: Network, num_classes: int, key: jax.Array) -> Network:
    """Returns the network with a new random classifier, without the old class names and optimizer state."""
    model = network.model.clone(num_classes=num_classes)
    drawn = draw_classifier(model, key)
    fc = {'kernel': to_jax_layout(drawn['fc.weight']).copy(), 'bias': drawn['fc.bias']}
    variables = {**network.variables, 'params': {**network.variables['params'], 'fc': fc}}
    metadata = without_run(network.source.metadata)
    checkpoint = network.source.checkpoint
    if checkpoint is not None:
        checkpoint = Checkpoint({**checkpoint.state_dict, **drawn}, arch=checkpoint.arch)
    source = dataclasses.replace(network.source, metadata=metadata, checkpoint=checkpoint)
    return Network(model, variables, (), network.preprocessing, source)


def metadata_of(network: Network) -> dict[str, Any]:
    """Returns the metadata to store with a network: the stored ones, updated to its current settings."""
    stored = network.source.metadata
    made = make_metadata(_config_of(network), network.class_names, network.preprocessing)
    return {**made, **{k: v for k, v in stored.items() if k not in ('model', 'class_names', 'preprocessing')}}


def _config_of(network: Network) -> ModelConfig:
    """Returns the configuration of the model: the stored one if it still fits."""
    if 'model' in network.source.metadata:
        config = model_config(network.source.metadata['model'])
        same = build_model(config)
        kind = (network.model.middle, network.model.use_se)
        if settings_of(same) == settings_of(network.model) and (same.middle, same.use_se) == kind:
            return config
    return config_of(network.model)


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
    state_dict = to_torch(network.variables, network.model)
    hub.write_folder(folder, state_dict, metadata, hub.make_card(metadata, license, description))
