"""A model: its files, and the loaded model at work."""
