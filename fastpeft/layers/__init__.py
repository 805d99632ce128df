"""Drop-in modules: a base layer with its adapter."""
