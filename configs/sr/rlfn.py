"""RLFN as in its paper (Kong et al., CVPRW 2022, arXiv 2205.07514): three warm-started stages, the last one contrastive.

python -m experiments.train_sr --config=configs/sr/rlfn.py --workdir=runs/rlfn --data_dir=DF2K_HR_FOLDER

Expected from the paper: 32.24 dB on Set5 x4 (Y). Needs an accelerator and DIV2K + Flickr2K: about 3 x 1,000k steps of 64
patches. The paper gives crop, stages and where the contrastive loss enters; batch, rate and its decay are inferred from the
group's usual practice, and the weight is the value that suits images in [0, 1] and this form of the loss.
"""

from configs.sr.recipe import recipe, stage


def get_config():
    """Every setting of the run."""
    model = dict(network="rlfn", channels=52, mid=52, num_blocks=6, esa_features=16, data_range=255.0)
    long = dict(steps=1_000_000, learning_rate=5e-4, schedule="step", halve_every=200_000, patch=64, batch=64)
    config = recipe(
        model,
        stage_1=stage(**long),
        stage_2=stage(**long),
        stage_3=stage(**long, contrastive_weight=1e-3),
    )
    config.update(dict(average_decay=0.999, eval_size=0, log_every=1000, eval_every=20_000, checkpoint_every=10_000))
    return config
