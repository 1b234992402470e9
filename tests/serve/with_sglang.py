"""What SGLang's own loader makes of a LoRA adapter: the factors that it hands to its kernels. `make test-sglang`.

SGLang needs a GPU to serve, so its files `srt/lora/lora.py`, `utils.py` and `lora_config.py` run here with stand-ins
for what else they import. Arguments: the folder that SGLang is installed in, the adapter's folder, the base model's
folder, a file for the results of torch: layer number -> module -> its A, B, expected shapes of both, and expert.
"""

import importlib.machinery
import re
import sys
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

OWN = ("srt.lora.lora", "srt.lora.utils", "srt.lora.lora_config", "srt.layers.utils.common")
PACKAGES = ("", "srt", "srt.lora", "srt.layers", "srt.layers.utils")


class StandIn(ModuleType):
    """A module all of whose names are classes of their own."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIns(MetaPathFinder, Loader):
    """Finds SGLang's own files for the names in OWN, and a stand-in for every other module of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path=None, target=None):
        package, _, rest = name.partition(".")
        if package != "sglang":
            return None
        if rest in OWN:
            file = self.folder / "sglang" / Path(*rest.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module) -> None:
        if module.__name__ == "sglang.srt.layers.utils":
            module.get_layer_id = importlib.import_module("sglang.srt.layers.utils.common").get_layer_id


def main(folder: str, adapter: str, base: str, output: str) -> None:
    sys.meta_path.insert(0, StandIns(Path(folder)))
    lora = importlib.import_module("sglang.srt.lora.lora")
    utils = importlib.import_module("sglang.srt.lora.utils")
    config = importlib.import_module("sglang.srt.lora.lora_config").LoRAConfig(adapter)
    base_config = AutoConfig.from_pretrained(base)
    targets = utils.get_normalized_target_modules(config.target_modules)
    loaded = lora.LoRAAdapter("adapter", config, base_config, None, None)
    assert config.r == config.lora_alpha and loaded.scaling == 1
    loaded.initialize_weights_from_tensors(load_file(Path(adapter) / "adapter_model.safetensors"))
    found = {}
    for number, layer in enumerate(loaded.layers):
        for name, t in layer.weights.items():
            target = utils.get_target_module_name(name, targets)  # raises for what would have no buffer
            expert = re.search(r"experts\.(\d+)\.", name)
            target += "_moe" if expert else ""
            in_features, out_features = utils.get_hidden_dim(target, base_config, None, number)
            rows = config.r * utils.get_stacked_multiply(target)
            part, shape = ("A", (rows, in_features)) if "lora_A" in name else ("B", (out_features, config.r))
            assert tuple(t.shape) == shape, (name, tuple(t.shape), shape)  # as when it is copied into a buffer
            found.setdefault((number, target, int(expert[1]) if expert else -1), {})[part] = t
    torch.save({"r": config.r, "layers": found}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
