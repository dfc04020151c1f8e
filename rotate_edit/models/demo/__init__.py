"""The bundled demo: a small world of our own, a model trained on it, and its evaluation items."""

from pathlib import Path

__all__ = ["demo_model_folder"]


def demo_model_folder() -> Path:
    """The folder of the bundled checkpoint, which `from_pretrained` loads without a network."""
    return Path(__file__).resolve().parent / "model"
