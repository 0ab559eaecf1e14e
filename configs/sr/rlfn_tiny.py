"""A small RLFN through every kind of stage of the paper: warm starts, contrastive loss, soft filter pruning, L2.

python -m experiments.train_sr --config=configs/sr/rlfn_tiny.py --workdir=runs/rlfn_tiny

Starts at x2 and goes on at x4. Images: those that ship with scikit-image. Sized for minutes on a CPU.
"""

from configs.sr.recipe import recipe, stage


def get_config():
    """Every setting of the run."""
    model = dict(network="rlfn", channels=16, mid=16, num_blocks=2, esa_features=8, data_range=1.0)
    return recipe(
        model,
        stage_1=stage(scale=2, steps=600),
        stage_2=stage(),
        stage_3=stage(steps=600, contrastive_weight=1e-3),
        stage_4=stage(steps=600, contrastive_weight=1e-3, prune_rate=0.125),
        stage_5=stage(steps=600, loss="l2", learning_rate=2e-4),
    )
