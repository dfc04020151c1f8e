"""Reports, cards and figures."""
