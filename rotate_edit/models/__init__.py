"""Model files and loaded models."""
