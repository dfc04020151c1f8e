"""Edits: what is changed in which weights."""
