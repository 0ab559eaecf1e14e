"""RLFN as for the NTIRE 2022 challenge: warm starts, contrastive loss, soft filter pruning 48 to 46 channels, L2 at the end.

python -m experiments.train_sr --config=configs/sr/rlfn_ntire.py --workdir=runs/rlfn_ntire --data_dir=DF2K_HR_FOLDER

Expected from the challenge: 29.00 dB RGB on DIV2K validation x4, 317,218 parameters. Needs an accelerator and DIV2K +
Flickr2K. Channel counts are those of the released network; step counts and rates are inferred.
"""

from configs.sr.recipe import recipe, stage


def get_config():
    """Every setting of the run."""
    model = dict(network="rlfn", channels=48, mid=48, num_blocks=4, esa_features=16, data_range=255.0)
    long = dict(steps=1_000_000, learning_rate=5e-4, schedule="step", halve_every=200_000, patch=64, batch=64)
    contrastive = long | dict(contrastive_weight=1e-3)
    config = recipe(
        model,
        stage_1=stage(**long),
        stage_2=stage(**long),
        stage_3=stage(**contrastive),
        stage_4=stage(**contrastive, prune_rate=2 / 48, prune_every=10_000),
        stage_5=stage(**long | dict(loss="l2", steps=500_000, learning_rate=2e-5, patch=128)),
    )
    config.update(dict(average_decay=0.999, eval_size=0, log_every=1000, eval_every=20_000, checkpoint_every=10_000))
    return config
