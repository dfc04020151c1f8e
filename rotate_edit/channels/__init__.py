"""Vocabulary channels: the solver, channel sets, and the search for a concept's neurons."""
