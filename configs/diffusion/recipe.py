"""Settings that all trainings of `experiments.train_dit` share."""

from ml_collections import ConfigDict


def settings(**changes) -> ConfigDict:
    """Every setting of a run."""
    config = dict(
        seed=0,
        data="digits",
        objective="flow",
        model=dict(  # fields of jaxcomp.models.dit_config.DiTConfig; the classes are the data's
            size=(4, 4), channels=4, patch=(1, 1), hidden_size=48, num_layers=4, num_heads=4, mlp_size=192
        ),
        batch_size=64,
        steps=5000,
        learning_rate=2e-3,
        warmup_steps=200,
        beta2=0.99,
        clip_norm=1.0,
        average_decay=0.999,
        label_dropout=0.1,
        guidance=1.5,
        sample_steps=50,
        samples_per_class=20,
        log_every=50,
        eval_every=2500,
        checkpoint_every=250,
    )
    return ConfigDict(config | changes)
