"""PEFT's own modules, computed by our ops: the module tree stays PEFT's, only ``forward`` is ours."""
