"""Your own pictures, from scratch: a folder with train/ and val/, in each a folder of pictures a class.

Command: python train.py --config=configs/image_folder.py --config.data.dir=DIR --workdir=runs/mine
         (another variant: --config=configs/image_folder.py:epsanet50_large)
Hardware: a GPU or TPU for whole trainings. On a CPU it runs, at a few pictures a second.
Expected result: depends on the pictures; not yet run to the end.

SGD with momentum, label smoothing and augmentation are the reference's. Cosine with warm-up instead of steps,
and a smaller batch with the learning rate scaled along (0.1 a 256 pictures), suit small data sets.
"""

from epsanet_jax.training.config import Config, DataConfig, ModelConfig, OptimizerConfig, ScheduleConfig


def get_config(variant: str = 'epsanet50_small') -> Config:
    return Config(
        batch_size=64,
        epochs=90,
        log_every_steps=10,
        model=ModelConfig(name=variant),
        data=DataConfig(source='folder'),
        optimizer=OptimizerConfig(lr=0.025),
        schedule=ScheduleConfig(name='cosine', warmup_epochs=5),
    )
