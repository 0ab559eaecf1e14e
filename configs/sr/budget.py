"""RLFN, IMDN and DITN of 32 to 33 thousand parameters, and stages of RLFN, each pair under one budget of patches.

python -m experiments.train_sr --config=configs/sr/budget.py:ditn --workdir=runs/budget_ditn
python -m experiments.sr_budget --workdir=runs/sr_budget [--card=sr_stages]     all arms of a result card, every seed

Budget: the same patches in the same order (seed, 16 of 24 x 24 low-resolution pixels a step), optimizer and schedule; 1,200
steps for the networks, 1,500 for the stages. Time differs: a step takes about 45 ms (RLFN, IMDN) or 220 ms (DITN) of one CPU
core. The stages ask what RLFN's paper (arXiv 2205.07514) claims: a warm start beats one long schedule, and the contrastive loss
with its shallow extractor adds to that. Expected: all networks beat bicubic by 0.3 dB or more; they differ by less than 0.2 dB.
"""

from configs.sr.recipe import recipe, stage

RLFN = dict(network="rlfn", channels=18, mid=18, num_blocks=2, esa_features=8, data_range=1.0)
IMDN = dict(network="imdn", channels=20, num_blocks=2)
DITN = dict(network="ditn", channels=24, inner_layers=1, spatial_layers=1)
WARM = dict(stage_1=stage(steps=600), stage_2=stage(steps=600))
ARMS = {
    "rlfn": (RLFN, dict(stage_1=stage(steps=1200))),
    "imdn": (IMDN, dict(stage_1=stage(steps=1200))),
    "ditn": (DITN, dict(stage_1=stage(steps=1200))),
    "one_schedule": (RLFN, dict(stage_1=stage(steps=1500))),
    "warm_start": (RLFN, WARM | dict(stage_3=stage(steps=300))),
    "contrastive": (RLFN, WARM | dict(stage_3=stage(steps=300, contrastive_weight=1e-3))),
}


def get_config(arm: str = "rlfn"):
    """Every setting of one arm."""
    model, stages = ARMS[arm]
    config = recipe(model, **stages)
    config.eval_every = 600
    return config
