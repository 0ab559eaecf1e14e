"""Settings that all super-resolution trainings share; the other files of this folder complete them."""

from ml_collections import ConfigDict


def stage(**changes) -> dict:
    """A stage of training: L1, Adam, cosine schedule, no contrastive loss, no pruning."""
    defaults = dict(
        loss="l1",  # or "l2"
        contrastive_weight=0.0,  # of the contrastive loss that is added to it
        scale=4,
        steps=1200,
        learning_rate=2e-3,
        schedule="cosine",  # or "step"
        halve_every=300,  # steps, of schedule "step"
        patch=24,  # low-resolution pixels
        batch=16,
        prune_rate=0.0,  # share of the trunk's filters that soft filter pruning zeroes; RLFN only
        prune_every=100,  # steps, as an epoch
    )
    return defaults | changes


def recipe(model: dict, **stages) -> ConfigDict:
    """Every setting of a run: the network's fields, and the stages in the order of their names."""
    return ConfigDict(
        dict(
            seed=0,
            model=model,
            stages=stages,
            contrastive_features=64,
            contrastive_seed=0,
            average_decay=0.99,
            eval_size=256,  # central crop of the evaluation images; 0 takes them whole
            log_every=100,
            eval_every=600,
            checkpoint_every=200,
        )
    )
