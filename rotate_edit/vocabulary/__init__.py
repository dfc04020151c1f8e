"""Tokens, words, and the tables that vectors are projected on."""
