"""The folder of a base model: its safetensors files, their index, its config, and the files that go with them."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from .dequantised import dequantised, is_fp8
from .files import CONFIG, read_json, read_safetensors, write_json
from .prompting import copy_prompting

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", INDEX)


def base_folder(base: str | os.PathLike[str] | None) -> Path:
    """The base model's folder: a folder, or a Hub id that is in the local cache.

    Raises:
        FileNotFoundError: if it is neither.
    """
    if not base:
        raise FileNotFoundError("the adapter's config names no base model; give --base FOLDER.")
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(base), local_files_only=True))
    except Exception as error:
        raise FileNotFoundError(
            f"the base model {str(base)!r} is no folder and not in the local Hub cache; give --base FOLDER."
        ) from error


class BaseModel:
    """A model folder of safetensors; of FP8 weights, read as those of the same model in floating point.

    Attributes:
        folder: the folder.
        files: file name -> its tensors.
        file_of: tensor name -> file name.
        config: content of config.json.
        is_fp8: whether the weights in the folder are FP8.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
            base = read_json(folder / CONFIG).get("base_model_name_or_path")
            raise ValueError(f"base model {str(folder)!r} is an adapter; its base model is {base!r}, give that.")
        self.config = read_json(folder / "config.json")
        self.is_fp8 = is_fp8(self.config)
        if self.config.get("quantization_config") and not self.is_fp8:
            raise ValueError(f"base model {str(folder)!r} is quantised; merge into the unquantised model.")
        if (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{str(folder / INDEX)!r} has no weight_map from tensors to files.")
            names = sorted(set(weight_map.values()))
        elif (folder / SINGLE).is_file():
            names = [SINGLE]
        else:
            raise FileNotFoundError(f"base model {str(folder)!r} has neither {SINGLE} nor {INDEX}.")
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise FileNotFoundError(f"base model {str(folder)!r} lacks the file {name!r} of its index.")
        self.files = {name: read_safetensors(folder / name) for name in names}
        if self.is_fp8:
            self.files = dequantised(self.files, self.config)
            self.config = {name: value for name, value in self.config.items() if name != "quantization_config"}
        self.file_of = {tensor: name for name, tensors in self.files.items() for tensor in tensors}

    def spec(self, name: str) -> Tensor:
        return self.files[self.file_of[name]].specs[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.files[self.file_of[name]][name]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of


def copy_other_files(model: BaseModel, folder: Path, dtype: torch.dtype | None, adapter: Path | None = None) -> None:
    """Tokenizer, config, generation config and the rest; the index and the config's dtype are brought up to date.

    Tokenizer and generation config are the adapter's where its folder has them: the merged model is then asked, and
    stops, as the adapter was trained.
    """
    for path in sorted(model.folder.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS) and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    if adapter is not None:
        copy_prompting(adapter, folder)
    config = dict(model.config)
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    if (model.folder / INDEX).is_file():
        index = read_json(model.folder / INDEX)
        written = [t for name in model.files for t in read_safetensors(folder / name).specs.values()]
        total = sum(t.numel() * t.element_size() for t in written)
        index["weight_map"] = model.file_of
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        write_json(folder / INDEX, index)
