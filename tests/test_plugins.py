"""Entry points for other training programs, against stand-ins for what they import of those programs.

The stand-ins have the signatures of axolotl 0.19.0 and ms-swift 4.6.0, and do for a tiny model what these do.
"""

import importlib.util
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import gralora.plugins
from gralora import LoraConfig
from gralora.ops import plans

FOLDER = Path(gralora.plugins.__path__[0])


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.fixture
def load(monkeypatch):
    """Import a plugin as a program does that gives it modules of its own."""

    def plugin(name: str, **modules: dict) -> ModuleType:
        for path, contents in modules.items():
            module = ModuleType(path)
            module.__dict__.update(contents)
            monkeypatch.setitem(sys.modules, path, module)
        spec = importlib.util.spec_from_file_location(f"plugin_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return plugin


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 9)[None]).logits


def randomise(model) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)


# ---- Axolotl


class Settings(dict):
    """As Axolotl's DictDefault: what is not there is None."""

    def __getattr__(self, name):
        return self.get(name)

    def __getitem__(self, name):
        return self.get(name)


def load_lora(model, cfg, inference=False, config_only=False):
    assert config_only
    options = {"use_rslora": cfg.peft_use_rslora} if cfg.peft_use_rslora else {}
    return None, peft.LoraConfig(  # as _build_peft_lora_config, with its empty values
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        target_modules=cfg.lora_target_modules or [],
        target_parameters=cfg.lora_target_parameters or [],
        layers_to_transform=cfg.peft_layers_to_transform,
        layers_pattern=cfg.peft_layers_pattern,
        lora_dropout=cfg.lora_dropout,
        fan_in_fan_out=cfg.lora_fan_in_fan_out,
        modules_to_save=cfg.lora_modules_to_save if cfg.lora_modules_to_save else None,
        exclude_modules=cfg.lora_exclude_modules or None,
        bias="none",
        task_type="CAUSAL_LM",
        **options,
    )


@pytest.fixture
def axolotl(load):
    capabilities = namedtuple("AdapterCapabilities", "name lora_like relora", defaults=(False, False))
    base = {"AdapterCapabilities": capabilities, "BasePlugin": object}
    modules = {"axolotl": {}, "axolotl.integrations": {}, "axolotl.integrations.base": base, "axolotl.loaders": {}}
    return load("axolotl", **modules, **{"axolotl.loaders.adapter": {"load_lora": load_lora}})


SETTINGS = {"adapter": "gralora", "lora_r": 8, "lora_alpha": 24, "lora_dropout": 0.1, "peft_use_rslora": True}
SETTINGS |= {"lora_target_modules": ["q_proj", "up_proj"], "gralora_k": 4, "hybrid_r": 4, "gralora_scaling": "matched"}


def test_axolotl_builds_and_loads_the_adapter(axolotl, model, tiny_model, tmp_path):
    plugin = axolotl.GraloraPlugin()
    assert [(one.name, one.lora_like) for one in plugin.get_adapter_capabilities()] == [("gralora", True)]
    base = logits(model)
    adapted, config = plugin.load_adapter(model, Settings(SETTINGS))
    assert isinstance(config, LoraConfig) and adapted.peft_config["default"] is config
    assert (config.use_gralora, config.gralora_k, config.hybrid_r, config.r, config.lora_alpha) == (True, 4, 4, 8, 24)
    assert (config.lora_dropout, config.use_rslora, config.target_modules) == (0.1, True, {"q_proj", "up_proj"})
    assert config.gralora_scaling == "matched"
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tiny_model)
    again, config = plugin.load_adapter(again, Settings(SETTINGS, lora_model_dir=str(tmp_path)), inference=True)
    assert torch.equal(logits(again), logits(adapted)) and not torch.allclose(logits(again), base, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in again.parameters()) and config.gralora_k == 4


def test_what_axolotl_leaves_alone_is_saved_as_peft_saves_it(axolotl, model, tmp_path):
    """And what it trains is read by our commands, which Axolotl's empty values would have stopped."""
    adapted, config = axolotl.GraloraPlugin().load_adapter(model, Settings(SETTINGS, peft_use_rslora=None))
    assert config.fan_in_fan_out is False and config.target_parameters is None and config.use_rslora is False
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    gralora.to_lora(tmp_path / "adapter", tmp_path / "lora", "peft")
    gralora.convert_adapter(tmp_path / "adapter", tmp_path / "again")


def test_axolotl_settings(axolotl, model):
    plugin = axolotl.GraloraPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    fields = getattr(sys.modules[module], name)
    assert (
        fields().model_dump() == {"gralora_k": "auto", "hybrid_r": 0, "gralora_scaling": "lora"}
        and fields(gralora_k=4).gralora_k == 4
    )
    assert plugin.load_adapter(model, Settings(SETTINGS, adapter="lora")) is None
    nothing, config = plugin.load_adapter(model, Settings(SETTINGS, gralora_k=None), config_only=True)
    assert nothing is None and config.gralora_k == "auto" and not isinstance(model, PeftModel)
    for refused in ("lora_mlp_kernel", "load_in_4bit"):
        with pytest.raises(ValueError, match=f"{refused}: True cannot be combined with adapter: gralora"):
            plugin.load_adapter(model, Settings(SETTINGS, **{refused: True}))


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_axolotl_accelerates_plain_lora(axolotl, model, adapter, monkeypatch):
    """Unless its own kernels compute it, or GRALORA_KERNELS leaves it to PEFT; other adapters are left alone."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    plugin = axolotl.GraloraPlugin()

    def layers(**settings):
        plugin.post_lora_load(Settings(settings), adapted)
        return gralora.describe(adapted).partition(" of")[0]

    assert layers(adapter=adapter, lora_mlp_kernel=True) == layers(adapter="ia3") == layers() == "0"
    monkeypatch.setattr(plans, "choice", "torch")
    assert layers(adapter=adapter) == "0"
    monkeypatch.setattr(plans, "choice", "portable")
    assert layers(adapter=adapter) == "2"


# ---- ms-swift


class Tuner:
    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **options):
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **options)

    @staticmethod
    def from_pretrained(model, model_id, **options):
        return PeftModel.from_pretrained(model, model_id, **options)


@pytest.fixture
def swift_tuners(load):
    functions = {
        "get_target_modules": lambda args, model: args.target_modules,
        "get_modules_to_save": lambda args, model, task_type=None: [
            *args.modules_to_save,
            *(["v_head"] if task_type and task_type.lower() == "seq_cls" else []),
        ],
    }
    tuners = {"PeftTuner": Tuner, "tuners_map": {}}
    modules = {"swift": {}, "swift.pipelines": {}, "swift.pipelines.train": {}, "swift.tuner_plugin": tuners}
    load("ms_swift", **modules, **{"swift.pipelines.train.tuner": functions})
    return tuners["tuners_map"]


@pytest.fixture
def swift(swift_tuners):
    return swift_tuners["gralora"]


ARGS = {"task_type": "causal_lm", "lora_rank": 8, "lora_alpha": 24, "lora_dropout": 0.1, "use_rslora": True}
ARGS |= {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"], "lora_bias": "none"}
ARGS |= {"init_weights": True, "lora_dtype": None, "use_dora": False, "lorap_lr_ratio": None}
ARGS |= {"target_parameters": None, "tuner_type": "gralora"}


def test_ms_swift_builds_saves_and_loads_the_adapter(swift, model, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("GRALORA_K", "4")
    monkeypatch.setenv("GRALORA_HYBRID_R", "4")
    monkeypatch.setenv("GRALORA_SCALING", "matched")
    base = logits(model)
    adapted = swift.prepare_model(SimpleNamespace(**ARGS), model)
    config = adapted.peft_config["default"]
    assert (config.use_gralora, config.gralora_k, config.hybrid_r, config.r, config.lora_alpha) == (True, 4, 4, 8, 24)
    assert (config.lora_dropout, config.use_rslora, config.modules_to_save) == (0.1, True, ["lm_head"])
    assert config.gralora_scaling == "matched"
    randomise(adapted)
    swift.save_pretrained(adapted, str(tmp_path))
    again = swift.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path))
    assert torch.equal(logits(again), logits(adapted)) and not torch.allclose(logits(again), base, atol=1e-3)


@pytest.mark.parametrize(
    ("task_type", "peft_type", "saved"),
    [
        ("causal_lm", "CAUSAL_LM", []),
        ("seq_cls", "SEQ_CLS", ["v_head"]),
        ("embedding", None, []),
        ("reranker", "SEQ_CLS", []),
        ("generative_reranker", "CAUSAL_LM", []),
        ("decision", "CAUSAL_LM", []),
    ],
)
def test_ms_swift_task_types(swift, model, monkeypatch, task_type, peft_type, saved):
    """As ms-swift maps its own to PEFT's for `--tuner_type lora`; to its list of modules to save it gives its own."""
    made = []
    monkeypatch.setattr(sys.modules[swift.__module__], "get_peft_model", lambda model, config: made.append(config))
    swift.prepare_model(SimpleNamespace(**ARGS | {"task_type": task_type, "modules_to_save": []}), model)
    assert made[0].task_type == peft_type and made[0].modules_to_save == saved


def test_ms_swift_target_parameters(swift, model, monkeypatch):
    made = []
    monkeypatch.setattr(sys.modules[swift.__module__], "get_peft_model", lambda model, config: made.append(config))
    swift.prepare_model(SimpleNamespace(**ARGS | {"target_parameters": ["q_proj.weight"]}), model)
    assert made[0].target_parameters == ["q_proj.weight"]


def test_ms_swift_accelerates_plain_lora(swift_tuners, model, tiny_model, tmp_path, monkeypatch):
    """PEFT's LoRA, with PEFT's config and tensors, also when it is loaded to go on."""
    monkeypatch.delenv("GRALORA_K", raising=False)
    tuner = swift_tuners["accelerated_lora"]
    adapted = tuner.prepare_model(SimpleNamespace(**ARGS | {"tuner_type": "accelerated_lora"}), model)
    randomise(adapted)
    tuner.save_pretrained(adapted, str(tmp_path))
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    assert "gralora" not in (tmp_path / "adapter_config.json").read_text()
    again = tuner.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path))
    for one in (adapted, again):
        assert gralora.describe(one).startswith("4 of 4 LoRA layers run as one operation")
    assert torch.equal(logits(again), logits(adapted))
    with pytest.raises(ValueError, match="cannot be combined with --tuner_type accelerated_lora"):
        tuner.prepare_model(SimpleNamespace(**ARGS | {"lorap_lr_ratio": 2.0, "tuner_type": "accelerated_lora"}), model)


def test_ms_swift_settings(swift, model, monkeypatch):
    monkeypatch.delenv("GRALORA_K", raising=False)
    with pytest.raises(ValueError, match="--lorap_lr_ratio 2.0 cannot be combined with --tuner_type gralora"):
        swift.prepare_model(SimpleNamespace(**ARGS | {"lorap_lr_ratio": 2.0}), model)
    with pytest.raises(ValueError, match="init_lora_weights='lora-ga'"):
        swift.prepare_model(SimpleNamespace(**ARGS | {"init_weights": "lora-ga"}), model)
    adapted = swift.prepare_model(SimpleNamespace(**ARGS | {"lora_dtype": "bfloat16"}), model)
    assert adapted.peft_config["default"].gralora_k == 2, "what auto stands for"
    dtypes = {p.dtype for name, p in adapted.named_parameters() if p.requires_grad and "lora_" in name}
    assert dtypes == {torch.bfloat16}
