"""Flax Linen models; they know nothing of compression."""

from jaxcomp.models.attention import Context, KVCache, dot_product_attention
from jaxcomp.models.generate import generate
from jaxcomp.models.llama import Block, Llama, init_cache, layer_table, stack_layers, unstack_layers
from jaxcomp.models.llama_config import LlamaConfig
from jaxcomp.models.rope import Rope

__all__ = [
    "Block",
    "Context",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Rope",
    "dot_product_attention",
    "generate",
    "init_cache",
    "layer_table",
    "stack_layers",
    "unstack_layers",
]
