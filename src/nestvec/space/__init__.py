"""Where vectors live: Space, Embeddings, their sizes and their files. No heavy imports."""

from nestvec.space.embeddings import Embeddings
from nestvec.space.nesting import halving, known_dims, parse_dims
from nestvec.space.space import Space

__all__ = ["Embeddings", "Space", "halving", "known_dims", "parse_dims"]
