"""Change the model, keep the gallery."""

from nestvec.upgrade.prefix import compatible_prefix

__all__ = ["compatible_prefix"]
