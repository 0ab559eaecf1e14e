"""Weight shapes of LLaMA models, as [N outputs, K inputs] of every linear layer of a block."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A named matrix: n outputs, k inputs."""

    name: str
    n: int
    k: int


LLAMA_7B = (
    Shape("llama7b/attention", 4096, 4096),  # q, k, v, o
    Shape("llama7b/gate_up", 11008, 4096),
    Shape("llama7b/down", 4096, 11008),
)
LLAMA_70B = (
    Shape("llama70b/query_output", 8192, 8192),
    Shape("llama70b/key_value", 1024, 8192),
    Shape("llama70b/gate_up", 28672, 8192),
    Shape("llama70b/down", 8192, 28672),
)
SHAPES = {shape.name: shape for shape in (*LLAMA_7B, *LLAMA_70B)}
