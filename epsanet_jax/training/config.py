"""The configuration of a run. The defaults are the recipe of the reference.

0, '' and () mean "not set" where a default is derived from other fields, so that the command line can set
every field.
"""

import dataclasses
from typing import Any

from epsanet_jax.data.augment import Mixing
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.models import ModelConfig


@dataclasses.dataclass(slots=True)
class DataConfig:
    """The images.

    Attributes:
        source: 'folder' (class folders, parquet, WebDataset shards or tables, see `data.formats.find`),
            'records' (the output of `epsanet prepare`), 'tfds' (a TFDS dataset or 'digits') or 'synthetic'.
        name: name of the TFDS dataset.
        dir: folder that contains the splits or the records, or TFDS's data directory ('': its default).
        train_split: folder, file or TFDS split for training.
        eval_split: folder, file or TFDS split for evaluation.
        label_column: column or key of the labels in parquet, tables and JSON; '': a usual name.
        image_size: height and width of the network's input in training, pixels.
        eval_image_size: height and width of the input in evaluation and use; 0: `image_size`.
        resize_size: shorter side before the centre crop in evaluation, pixels.
        crop_scale: smallest and largest share of an image's area in a training crop.
        crop_ratio: smallest and largest width / height of a training crop.
        flip: whether training mirrors images at random, with probability 1/2.
        color_jitter: brightness, contrast, saturation and hue, as in torchvision's ColorJitter.
        randaugment_ops: number of RandAugment operations per image; 0: none.
        randaugment_magnitude: strength of RandAugment, 0 to 30.
        random_erasing: probability that a rectangle of an image is filled with the mean colour.
        reduced_decoding: decode large JPEGs for training only at the resolution that the crop needs: much
            faster, with slightly different pixels.
        mean: mean of each channel, for values of 8 or 16 bits in 0..1, and other values as they are; as many
            numbers as `model.in_channels`.
        std: standard deviation of each channel, in the same units.
        exif_orientation: whether to rotate images by their EXIF tag; torchvision's ImageFolder does not.
        workers: decoding processes; 0: threads of this process; -1: one per 8 processors, if more than 8.
        threads: decoding threads in this process or in each worker; 0: by the number of processors.
        on_bad: 'stop' or 'skip' at an image that cannot be decoded.
        max_bad_images: number of different images that a process may skip before the run stops.
        synthetic_examples: number of synthetic images in training, and in evaluation.
        synthetic_classes: number of their classes.
    """

    source: str = 'folder'
    name: str = ''
    dir: str = ''
    train_split: str = 'train'
    eval_split: str = 'val'
    label_column: str = ''
    image_size: int = 224
    eval_image_size: int = 0
    resize_size: int = 256
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    random_erasing: float = 0.0
    reduced_decoding: bool = False
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    exif_orientation: bool = True
    workers: int = -1
    threads: int = 0
    on_bad: str = 'stop'
    max_bad_images: int = 100
    synthetic_examples: int = 1280
    synthetic_classes: int = 10

    @property
    def size_in_use(self) -> int:
        """Height and width of the network's input in evaluation and use, pixels."""
        return self.eval_image_size or self.image_size

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images in evaluation and use."""
        return Preprocessing(
            self.size_in_use, self.resize_size, tuple(self.mean), tuple(self.std), self.exif_orientation
        )


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
    """The optimizer, see `training.optimizer.make_optimizer`.

    Attributes:
        lr: peak learning rate of the schedule.
        momentum: momentum of SGD and LARS.
        nesterov: whether to use Nesterov momentum.
        weight_decay: coupled in SGD and LARS, decoupled in AdamW and LAMB.
        name: 'sgd', 'adamw', 'lamb' or 'lars'.
        lr_batch: batch size for which `lr` is given; `lr` is scaled linearly to `batch_size`. 0: not scaled.
        b1: decay rate of the gradient's mean in AdamW and LAMB.
        b2: decay rate of the squared gradient's mean in AdamW and LAMB.
        eps: term added to the square root of that mean in AdamW and LAMB.
        trust_coefficient: trust coefficient of LARS.
        decay_norm_and_bias: whether weight decay (and LARS's trust ratio) also apply to BatchNorm parameters
            and biases.
        clip_norm: largest norm of the whole gradient, which is scaled down if it is longer. 0: no limit.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    name: str = 'sgd'
    lr_batch: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    trust_coefficient: float = 0.001
    decay_norm_and_bias: bool = True
    clip_norm: float = 0.0


@dataclasses.dataclass(slots=True)
class ScheduleConfig:
    """The learning rate over time, see `training.optimizer.make_schedule`."""

    name: str = 'step'
    warmup_epochs: float = 0.0
    step_epochs: float = 30.0
    step_factor: float = 0.1
    end_factor: float = 0.0


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
    """When to save in addition to every evaluation and the end, and which checkpoints to keep.

    Attributes:
        every_steps: save after every so many steps; 0: off.
        every_minutes: save after every so many minutes; 0: off.
        keep: number of latest checkpoints to keep; the best is always kept.
    """

    every_steps: int = 0
    every_minutes: float = 10.0
    keep: int = 2


@dataclasses.dataclass(slots=True)
class ProfileConfig:
    """The steps whose trace is written to profile/ in the workdir; `steps` 0: no trace."""

    start: int = 10
    steps: int = 0


@dataclasses.dataclass(slots=True)
class Config:
    """A run.

    Attributes:
        seed: seed of the initial parameters, the order of examples and the augmentation.
        batch_size: size of the global batch, for any number of devices.
        gradient_accumulation_steps: number of microbatches that are computed one after the other to save
            memory. Each must hold whole BatchNorm groups; the update is the same.
        epochs: length of the training, possibly a fraction.
        steps: length in steps instead of epochs; 0: use `epochs`.
        balance_classes: whether the batches hold the classes of unbalanced data in equal shares; see
            `data.order.balanced`. An epoch still has as many images as the data.
        label_smoothing: label smoothing in training and evaluation.
        mixup_alpha: parameter of mixup's Beta distribution; 0: no mixup.
        cutmix_alpha: parameter of cutmix's Beta distribution; 0: no cutmix. With both, each image gets one of
            them with probability 1/2.
        stochastic_depth: probability in training that the last block is skipped for an image. It grows
            linearly from 0 at the first block.
        ema_decay: decay of the moving average of parameters and BatchNorm statistics, which is evaluated too
            and used by the commands; 0: no moving average.
        log_every_steps: steps between two lines of training metrics.
        eval_every_epochs: epochs between two evaluations; 0: only at the end.
        eval_batch_size: rounded up to a multiple of the number of devices; 0: `batch_size`.
        init_from: weights to start from: a PyTorch or safetensors file, a workdir or a checkpoint. A
            classifier for other classes is replaced by a new one.
        init_partial: whether to take what fits of other networks' weights and to draw the rest, for example
            a ResNet's; see `weights.start.start_from`.
        init_optimizer: whether to take momentum, epoch and learning rate from that file too.
        freeze: regular expression. Parameters whose names match, such as 'layer1_0/conv1/kernel', do not
            change, nor do the statistics of BatchNorms that match. Examples: '^conv1|^bn1|^layer[12]', or
            '^(?!fc)' for everything but the classifier.
        check_kernels: whether a run on TPUs with conv='auto' compares the Pallas kernels with XLA's
            convolutions when it starts, and uses them if they are right and faster.
        tensorboard: whether to write events for TensorBoard into the workdir, if it is on a local disk.
        tracker: 'wandb' (Weights & Biases), 'trackio' or '': where to send metrics and configuration too.
        tracker_project: name of the project there.
    """

    seed: int = 0
    batch_size: int = 256
    gradient_accumulation_steps: int = 1
    epochs: float = 120.0
    steps: int = 0
    balance_classes: bool = False
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    stochastic_depth: float = 0.0
    ema_decay: float = 0.0
    log_every_steps: int = 50
    eval_every_epochs: float = 1.0
    eval_batch_size: int = 0
    init_from: str = ''
    init_partial: bool = False
    init_optimizer: bool = False
    freeze: str = ''
    check_kernels: bool = True
    tensorboard: bool = True
    tracker: str = ''
    tracker_project: str = 'epsanet_jax'
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)


def with_frozen_bn(config: Config) -> ModelConfig:
    """Returns the model's configuration, in which BatchNorms that match `freeze` are frozen too."""
    patterns = [pattern for pattern in (config.model.frozen_bn, config.freeze) if pattern]
    if len(patterns) > 1:
        patterns = [f'(?:{pattern})' for pattern in patterns]
    return dataclasses.replace(config.model, frozen_bn='|'.join(patterns))


def mixing(config: Config) -> Mixing | None:
    """Returns the settings of mixup and cutmix, or None if both are off."""
    mixup, cutmix = config.mixup_alpha, config.cutmix_alpha
    return Mixing(mixup, cutmix) if mixup or cutmix else None


# Fields that may change when a run is continued; all others, and the data's fingerprint, identify the run.
_FREE = (
    'epochs', 'steps', 'gradient_accumulation_steps', 'log_every_steps', 'eval_every_epochs',
    'eval_batch_size', 'check_kernels', 'checkpoint.', 'profile.', 'tensorboard', 'tracker', 'data.dir',
    'data.workers', 'data.threads', 'data.on_bad', 'data.max_bad_images',
)  # fmt: skip


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Returns {'optimizer.lr': 0.1, ...} of a configuration or of nested dicts."""
    items = tree if isinstance(tree, dict) else dataclasses.asdict(tree)
    flat: dict[str, Any] = {}
    for key, value in items.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = _as_lists(value)
    return flat


def _as_lists(value: Any) -> Any:
    return [_as_lists(v) for v in value] if isinstance(value, list | tuple) else value


def identity(config: Config, fingerprint: str, num_classes: int) -> dict[str, Any]:
    """Returns the fields that must be equal to continue a run, as {'field': value}."""
    fields = {k: v for k, v in flatten(config).items() if not k.startswith(_FREE)}
    return {**fields, 'model.num_classes': num_classes, 'data.fingerprint': fingerprint}
