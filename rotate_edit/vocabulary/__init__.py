"""Tokens, words and what vectors are projected on."""
