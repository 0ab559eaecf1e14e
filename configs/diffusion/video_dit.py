"""The video model that the caches of chunk-wise autoregressive sampling are tried on: shapes that move before a camera.

python -m experiments.train_video_dit --config=configs/diffusion/video_dit.py --workdir=runs/video_dit [--export=FOLDER]

Three chunks of three frames, 32 x 32 pixels, 64 tokens per frame; all data are drawn on the fly. 83 minutes on two busy cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of the run."""
    return ConfigDict(
        dict(
            seed=0,
            model=dict(frames=3, size=32, patch=4, width=64, depth=6, heads=2, mlp_ratio=4, classes=3),
            chunks=3,  # of a training video
            moving_camera=0.5,  # share of videos
            steps=6000,
            batch_size=8,
            learning_rate=3e-3,
            final_learning_rate=1e-4,
            warmup_steps=100,
            weight_decay=0.0,
            clip_norm=1.0,
            time_mean=0.2,  # noise level of a chunk: sigmoid of a normal with this mean and spread
            time_std=1.2,
            clean_share=0.4,  # of videos: the chunks before a random one are almost clean
            clean_time=0.05,  # their largest noise level
            loss_floor=0.3,  # noise level below which errors of x0 are not weighted more
            label_dropout=0.1,
            average_decay=0.998,
            log_every=100,
            sheet_every=800,
            sheet_steps=24,
            checkpoint_every=200,
        )
    )
