"""What a `DiT` is made of."""

import dataclasses
import math

from jaxcomp.models.patches import token_grid
from jaxcomp.models.positions import rope_angles, sincos_table


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Architecture of a `DiT`.

    Attributes:
      size: of an input, without batch and channels: (height, width), or (frames, height, width).
      channels: of an input.
      patch: of a token, along the axes of `size`.
      out_channels: of the output; None is `channels`, twice as many are learned variances behind the prediction.
      mlp_size: hidden features of the feed-forward layer.
      num_classes: of a class-conditional model; one more stands for "no class". 0: none.
      text_size: features of a text embedding that blocks attend to; 0: none.
      frequency_size: features of the diffusion time before its MLP.
      frequency_shift: see `timestep_features`.
      position: "sincos" adds a fixed table to the tokens, "rope" turns queries and keys.
      modulation: "linear" maps the condition in every block (DiT), "table" once, plus a learned table per block (Wan).
      qk_norm: RMS norm of queries and keys over all heads.
      norm_eps: of all norms.
      mlp_norm_eps: of the norm before the MLP, where it differs.

    Raises:
      ValueError: sizes that do not fit each other, or an unknown option.
    """

    size: tuple[int, ...]
    channels: int
    patch: tuple[int, ...]
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    out_channels: int | None = None
    num_classes: int = 0
    text_size: int = 0
    frequency_size: int = 256
    frequency_shift: float = 0.0
    position: str = "sincos"
    modulation: str = "linear"
    qk_norm: bool = False
    norm_eps: float = 1e-6
    mlp_norm_eps: float | None = None

    def __post_init__(self):
        for name in ("size", "patch"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        allowed = {"position": ("sincos", "rope"), "modulation": ("linear", "table")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, found {getattr(self, name)!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_classes and self.text_size:
            raise ValueError("a model takes classes or text; set num_classes or text_size to 0")
        self.positions()

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        return token_grid(self.size, self.patch)

    @property
    def num_tokens(self) -> int:
        """Tokens of an input."""
        return math.prod(self.grid)

    def positions(self):
        """The table of `position`: what is added to tokens, or angles."""
        if self.position == "sincos":
            return sincos_table(self.grid, self.hidden_size)
        return rope_angles(self.grid, self.hidden_size // self.num_heads)
