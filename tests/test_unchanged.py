"""A failed `load_adapter` changes nothing: the model before and after every field of the config with absurd values."""

import copy
import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama, token_ids
from saved import CONFIG, edit, logits, read, save_gralora, write
from torch import nn

import gralora
from gralora import LoraConfig

FIELDS = sorted({f.name for f in dataclasses.fields(LoraConfig)} | {"alpha", "gralora_alpha", "self", "unknown"})
ODD: list[Any] = [None, True, False, 0, -1, 1, 3, 7, 10**6, 2**31, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf]
ODD += [
    "",
    "x",
    "8",
    "auto",
    "matched",
    "lora",
    "all-linear",
    "all",
    "none",
    "gaussian",
    "pissa",
    "eva",
    "LORA",
    "(",
    ".*",
]
ODD += ["\0", "\ud800", "../../etc", [], [[]], [None], [0], [10**6], [-1], ["q_proj"], ["lm_head"], ["(", "["], [1.5]]
ODD += [
    [[0, 2]],
    [[0, 1], [0, 2]],
    [[0, 10**6]],
    [[1, 0]],
    [[-5, 2]],
    [[0, 2]] * 1000,
    [[0]],
    [[0, 1, 2]],
    [["a", "b"]],
]
ODD += [{}, {"a": 1}, {"q_proj": 3}, {"q_proj": 10**9}, {"(": 4}, {"embed_tokens": [1]}, {"embed_tokens": [10**6]}]
ODD += [["embed_tokens"], ["model"], ["q_proj", "model.layers"], ["mlp.up_proj.weight"], ["norm"], [".*"], "model"]
ODD += [{"ephemeral_gpu_offload": True}, {"base_model_class": "Popen", "parent_library": "subprocess"}]


def state(model: nn.Module) -> dict[str, Any]:
    """All that a model is: tensors by identity and value, modules, attributes, hooks, and its configs."""
    found: dict[str, Any] = {"modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()]}
    found["tensors"] = [(n, id(t), t.requires_grad) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    found["values"] = [hash(t.detach().numpy().tobytes()) for t in [*model.parameters(), *model.buffers()]]
    found["attributes"] = [(name, sorted(vars(m))) for name, m in model.named_modules()]
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    found["hooks"] = [(name, [list(getattr(m, hook)) for hook in hooks]) for name, m in model.named_modules()]
    for name in ("config", "generation_config"):
        found[name] = json.dumps(getattr(model, name).to_dict(), sort_keys=True, default=str)
    found["adapters"] = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    return found


def sweep(folder: Path, model: nn.Module, fields: list[str], values: list[Any]) -> dict[str, int]:
    """Give each value to each field of the saved adapter, and load it; returns how many were refused and loaded."""
    config, tensors = read(folder)
    before, counts = state(model), {"refused": 0, "loaded": 0}
    for field in fields:
        for value in values:
            write(folder, config | {field: value}, tensors)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    gralora.load_adapter(copy.deepcopy(model), folder, "new")
            except (ValueError, OSError, ImportError):
                counts["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{field}={value!r}: {type(error).__name__}: {error}") from error
            else:
                counts["loaded"] += 1
                continue  # a copy has it
            with warnings.catch_warnings(), pytest.raises((ValueError, OSError, ImportError)):
                warnings.simplefilter("ignore")
                gralora.load_adapter(model, folder, "new")
            after = state(model)
            for part, value_before in before.items():
                assert after[part] == value_before, f"{field}={value!r} changed the model's {part}"
    (folder / CONFIG).write_text(json.dumps(config))
    return counts


@pytest.mark.parametrize("loaded_before", [False, True])
def test_no_value_of_any_field_changes_the_model(tmp_path: Path, loaded_before: bool) -> None:
    """Each is refused with the model as it was, or loaded."""
    save_gralora(tmp_path / "in")
    model: Any = tiny_llama()
    if loaded_before:
        model = gralora.load_adapter(model, tmp_path / "in")
    with torch.no_grad():
        out = model(token_ids(2, 5)).logits
    fields, values = (FIELDS, ODD) if not loaded_before else (FIELDS[::3], ODD[::3])
    counts = sweep(tmp_path / "in", model, fields, values)
    print(f"{sum(counts.values())} configs, {counts}")
    assert counts["refused"] > counts["loaded"] > 0
    with torch.no_grad():
        assert torch.equal(model(token_ids(2, 5)).logits, out)


def test_replicated_layers_are_loaded_or_refused_by_number(tmp_path: Path) -> None:
    """As PEFT makes them; what PEFT would meet with an IndexError, or make by the million, is refused before."""
    expected = save_gralora(tmp_path, layer_replication=[[0, 2], [1, 2]])
    torch.testing.assert_close(logits(gralora.load_adapter(tiny_llama(), tmp_path)), expected)
    for ranges in ([[0, 3]], [[1, 1]], [[-1, 1]], [[0, 2], [1]], [[0, 2]] * 100):
        edit(tmp_path, layer_replication=ranges)
        with pytest.raises(ValueError, match="layer_replication=.*(has 2 layers|makes 200 layers of 2, more than 16)"):
            gralora.load_adapter(tiny_llama(), tmp_path)
