"""The small trained diffusion transformers that ship with the package; `experiments/train_dit.py` made them."""

from typing import Any, Literal

from jaxcomp.data.text import ASSETS
from jaxcomp.io.dit import load_dit
from jaxcomp.models.dit import DiT

FOLDER = ASSETS / "digits"


def load_digits_dit(objective: Literal["flow", "eps"]) -> tuple[DiT, dict[str, Any]]:
    """(model, float32 params) of class-conditional 4 x 4 x 4 latents of the embedded digits; numbers in `training.json`.

    "flow" predicts n - x0, "eps" the noise of the cosine schedule; label 10 means "no class".

    Raises:
      ValueError: another objective.
    """
    if objective not in ("flow", "eps"):
        raise ValueError(f"objective: expected 'flow' or 'eps', found {objective!r}")
    config, params = load_dit(FOLDER / objective)
    return DiT(config), params
