"""The small RLFN that ships with the package (jaxcomp/data/assets/sr/rlfn_small_x4.safetensors): trained on bundled images.

python -m experiments.train_sr --config=configs/sr/embedded.py --workdir=runs/embedded --save_as=rlfn_small_x4 \\
    --safetensors=jaxcomp/data/assets/sr/rlfn_small_x4.safetensors

Eight images are all that it has seen: it sharpens edges, and is a demonstration, not a rival of published weights. Expected:
1.4 dB over bicubic on three held-out photographs (x4, Y). About 7 minutes on one CPU core.
"""

from configs.sr.recipe import recipe, stage


def get_config():
    """Every setting of the run."""
    model = dict(network="rlfn", channels=24, mid=24, num_blocks=4, esa_features=8, data_range=1.0)
    config = recipe(model, stage_1=stage(steps=2000), stage_2=stage(steps=3000))
    config.eval_every = 2000
    return config
