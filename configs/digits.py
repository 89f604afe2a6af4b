"""Handwritten digits: trains a small EPSANet with four stages and full pyramids in minutes on any CPU.

Command: python train.py --config=configs/digits.py --workdir=runs/digits
Hardware: 2 CPU cores.
Expected result: at least 97 % top-1 on the 360 test images.
"""

from epsanet_jax.training.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)


def get_config() -> Config:
    return Config(
        batch_size=64,
        epochs=20,
        log_every_steps=25,
        eval_every_epochs=2,
        model=ModelConfig(
            name='epsanet50_small',
            layers=(1, 1, 1, 1),
            planes=(16, 32, 64, 128),
            groups=(1, 2, 4, 4),
            reduction=4,
        ),
        data=DataConfig(
            source='tfds',
            name='digits',
            train_split='train',
            eval_split='test',
            image_size=32,
            resize_size=32,
            crop_scale=(0.6, 1.0),
            flip=False,  # a mirrored 2 is not a 2
            mean=(0.3, 0.3, 0.3),
            std=(0.35, 0.35, 0.35),
        ),
        optimizer=OptimizerConfig(lr=0.05, weight_decay=5e-4),
        schedule=ScheduleConfig(name='cosine', warmup_epochs=1),
        checkpoint=CheckpointConfig(every_minutes=1),
    )
