"""Ours beside the peers: the same inputs, one process, outputs compared before anything is timed."""
