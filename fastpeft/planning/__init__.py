"""What a training step will hold in memory, before there is a model: :func:`fastpeft.plan`."""
