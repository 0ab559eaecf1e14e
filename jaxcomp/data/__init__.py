"""Small embedded data: text, a trained language model; real data come from files."""

from jaxcomp.data.embedded_model import load_embedded
from jaxcomp.data.text import batches, embedded_text, read_text, token_windows, wikitext2

__all__ = ["batches", "embedded_text", "load_embedded", "read_text", "token_windows", "wikitext2"]
