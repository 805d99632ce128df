"""The one exception that the example turns into a line on stderr and exit code 2."""


class InputError(Exception):
    """Something the user gave, or has to install, is missing or wrong."""
