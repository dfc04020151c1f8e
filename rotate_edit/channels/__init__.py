"""Vocabulary channels: the solver, channel sets, and where a concept is found."""
