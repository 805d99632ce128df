"""Linears that belong together, found by what they do: those that share an input, and gated MLPs."""
