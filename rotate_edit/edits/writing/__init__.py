"""Edits on disk: checkpoints, adapters and undo."""
