"""The differentiable ops: for each a plain reference, a custom op and a functional entry."""
