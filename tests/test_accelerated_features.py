"""PEFT's features on plain LoRA, with and without `gralora.accelerate`: outputs, parameters and errors are the same.

Each scenario goes through a feature of docs/peft-features.md with stock PEFT, and returns what it has computed. A test
runs it on a model as it is and on an accelerated one. `test_every_row_is_run` sees that no row is left out.
"""

import contextlib
import copy
import inspect
import io
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import adapter_layers, randomize, tiny_gpt2, tiny_llama, token_ids
from peft import PeftModel, get_peft_model, inject_adapter_in_model, optimizers
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils import loftq_utils
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import gralora
from gralora import fast_path

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[1] / "docs" / "peft-features.md"
TARGETS = ["q_proj", "k_proj", "down_proj"]
IDS = token_ids(3, 7)


class Bench:
    """Makes the models of a scenario, accelerated or not, and computes with them.

    Attributes:
        is_fast: whether models are accelerated.
        folder: an empty one.
    """

    def __init__(self, is_fast: bool, folder: Path) -> None:
        self.is_fast, self.folder = is_fast, folder
        folder.mkdir()

    def base(self, model: nn.Module | None = None, **config: Any) -> nn.Module:
        base = tiny_llama(torch.float64, **config) if model is None else model
        return gralora.accelerate(base) if self.is_fast else base

    def model(self, seed: int = 0, **config: Any) -> PeftModel:
        config = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS} | config
        torch.manual_seed(0)
        model = get_peft_model(self.base(), peft.LoraConfig(**config), autocast_adapter_dtype=False)
        return randomize(model, seed=seed).eval()

    def two(self, **other: Any) -> PeftModel:
        """A model with the adapters "default" and "other"."""
        model = self.model()
        model.add_adapter("other", peft.LoraConfig(**{"r": 6, "target_modules": ["q_proj", "up_proj"]} | other))
        return randomize(model, "other", seed=1).eval()

    def train(self, model: nn.Module, optimizer: Any = None, steps: int = 3, **inputs: Any) -> list[Tensor]:
        """Losses of some steps, and what was trained."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer or torch.optim.SGD(trained, lr=1e-2)
        losses = []
        model.train()
        for _ in range(steps):
            loss = model(input_ids=IDS, labels=IDS, **inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in trained)]


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


SCENARIOS: dict[str, Callable[[Bench], Any]] = {}
COVERS: dict[str, list[str]] = {}  # scenario -> beginnings of rows of the page


def scenario(*rows: str) -> Callable[[Callable[[Bench], Any]], Callable[[Bench], Any]]:
    def add(function: Callable[[Bench], Any]) -> Callable[[Bench], Any]:
        SCENARIOS[function.__name__] = function
        COVERS[function.__name__] = list(rows)
        return function

    return add


# The config


def config_scenario(name: str, *rows: str, **config: Any) -> None:
    def trained_and_merged(bench: Bench) -> Any:
        model = bench.model(**config)
        found = [logits(model), *bench.train(model), logits(model)]
        with contextlib.suppress(NotImplementedError, RuntimeError):  # of variants, and biases where there are none
            model.merge_adapter()
            found.append(logits(model))
            model.unmerge_adapter()
        return found

    trained_and_merged.__name__ = name
    scenario(*rows)(trained_and_merged)


config_scenario("patterns", "`rank_pattern`", rank_pattern={"q_proj": 2}, alpha_pattern={"0.*down_proj": 5})
config_scenario("rslora", "`use_rslora`", use_rslora=True)
config_scenario("lora_bias", "`lora_bias`", lora_bias=True)
config_scenario("bias", '`bias="all"`', bias="lora_only")
config_scenario("modules_to_save", "`modules_to_save`", modules_to_save=["lm_head"])
config_scenario("token_indices", "`trainable_token_indices`", trainable_token_indices=[3, 5])
config_scenario("all_linear", '`target_modules="all-linear"`', target_modules="all-linear")
config_scenario("layers", "`layers_to_transform`", layers_to_transform=[1], layers_pattern="layers")
config_scenario("regular_expression", "`layers_to_transform`", target_modules=r".*\.(q|k)_proj", exclude_modules="1.*")
config_scenario("gaussian", "`init_lora_weights=True`", init_lora_weights="gaussian")
config_scenario("dora", "`use_dora`", use_dora=True)
config_scenario("experts", "`target_modules=", target_modules=[], target_parameters=["mlp.down_proj.weight"])
VARIANTS = {"use_bdlora": "BdLoraConfig", "velora_config": "VeloraConfig", "kasa_config": "KasaConfig"}
KNOWN = {field.name for field in fields(peft.LoraConfig)}


@scenario("every other `init_lora_weights`")
def initialisations(bench: Bench) -> Any:
    found = []
    for name in ("olora", "pissa", "orthogonal", False):
        base = bench.base(tiny_llama())
        model = get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=name))
        model.add_adapter("more", peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="olora"))
        found += [logits(model), *bench.train(model)]
    return found


@contextlib.contextmanager
def loftq_without_gpu() -> Iterator[None]:
    """PEFT's function, which computes on a GPU, with the CPU in its place."""
    names = dict(vars(loftq_utils))
    exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.tuners.lora.layer.loftq_init", names["loftq_init"])
        yield


@scenario("every other `init_lora_weights`")
def initialisations_from_data(bench: Bench) -> Any:
    """EVA, CorDA, LoRA-GA and LoftQ: PEFT's own preparation, on a model that is accelerated already, and training."""
    options: dict[str, dict[str, Any]] = {
        "eva": {"eva_config": peft.EvaConfig(rho=2.0)},
        "corda": {"corda_config": CordaConfig(corda_method="kpm")},
        "lora_ga": {"lora_ga_config": peft.LoraGAConfig()},
        "loftq": {"loftq_config": peft.LoftQConfig(loftq_bits=4, loftq_iter=2)},
    }
    found = []
    for name, settings in options.items():
        base = bench.base(tiny_llama())
        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=name, **settings)
        torch.manual_seed(0)
        if name == "corda":
            preprocess_corda(base, config, run_model=lambda base=base: [base(row[None]) for row in IDS])
        if name == "lora_ga":
            preprocess_loraga(base, config, lambda base=base: base(input_ids=IDS, labels=IDS).loss.backward())
        with loftq_without_gpu():
            model = get_peft_model(base, config)
        if name == "eva":
            batches = [{"input_ids": token_ids(4, 7, seed=i), "attention_mask": torch.ones(4, 7)} for i in range(4)]
            peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        layers = adapter_layers(model)
        assert all(layer.lora_B["default"].weight.any() for layer in layers) != (name == "eva")
        found += [logits(model), *bench.train(model)]
    return found


@scenario("`lora_dropout`")
def dropout(bench: Bench) -> Any:
    model = bench.model(lora_dropout=0.5)
    found = [logits(model)]
    for layer in adapter_layers(model):
        layer.lora_dropout["default"].p = 1.0
    return [*found, model.train()(IDS).logits.detach()]


@scenario("one config for several models")
def one_config(bench: Bench) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "c_attn"])
    models = [get_peft_model(bench.base(base(torch.float64)), config) for base in (tiny_llama, tiny_gpt2)]
    return [logits(randomize(model)) for model in models]


@scenario("`layer_replication`")
def layer_replication(bench: Bench) -> Any:
    model = bench.model(layer_replication=[[0, 2], [0, 2]])
    return [logits(model, use_cache=False), *bench.train(model, use_cache=False)]


@scenario("`arrow_config`", "Arrow over")
def arrow(bench: Bench) -> Any:
    folders = []
    for seed in range(2):
        folders.append(str(bench.folder / f"{seed}"))
        bench.model(seed=seed).save_pretrained(folders[-1])
    model = peft.create_arrow_model(bench.base(), folders, peft.ArrowConfig(top_k=1))
    return logits(model)


@scenario("`arrow_config`")
def variants(bench: Bench) -> Any:
    found = []
    for field, name in VARIANTS.items():
        if field not in KNOWN or not hasattr(peft, name):
            continue
        kinds = {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}}
        model = bench.model(**{field: getattr(peft, name)(**kinds.get(field, {}))})
        found += [logits(model), *bench.train(model)]
    return found


@scenario("`alora_invocation_tokens`", "`adapter_names` with aLoRA", "`generate` with aLoRA")
def alora(bench: Bench) -> Any:
    model = bench.model(alora_invocation_tokens=[int(IDS[0, 3])], task_type="CAUSAL_LM")
    found = [logits(model), *bench.train(model)]
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    randomize(model, "other", 1)
    names = ["default", "other", "__base__"]
    found.append(logits(model, adapter_names=names))
    return [*found, model.generate(IDS, max_new_tokens=3, do_sample=False)]


# Several adapters


@scenario("`set_adapter`", "`delete_adapter`")
def several(bench: Bench) -> Any:
    model = bench.two()
    found = [logits(model)]
    model.set_adapter("other")
    found += [logits(model), *bench.train(model)]
    model.base_model.set_adapter(["default", "other"])
    found += [logits(model), *bench.train(model)]
    model.delete_adapter("default")
    model.set_adapter("other")
    return [*found, logits(model)]


@scenario("`adapter_names`: an adapter", "`adapter_names` in `generate`", "`adapter_names` with DoRA")
def mixed_batch(bench: Bench) -> Any:
    model = bench.two()
    names = ["other", "__base__", "default"]
    found = [logits(model, adapter_names=names), model.generate(IDS, adapter_names=names, max_new_tokens=3)]
    with pytest.raises(ValueError, match="DoRA") as error:
        logits(bench.two(use_dora=True), adapter_names=names)
    return [*found, str(error.value)]


@scenario("`PeftMixedModel`")
def mixed_model(bench: Bench) -> Any:
    config = peft.LoraConfig(r=4, target_modules=TARGETS)
    model = randomize(peft.get_peft_model(bench.base(), config, mixed=True))
    model.add_adapter("loha", peft.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for name, p in model.named_parameters():
        if "hada" in name:
            nn.init.constant_(p, 0.1)
    found = [logits(model)]
    model.set_adapter(["default", "loha"])
    return [*found, logits(model)]


@scenario("X-LoRA over")
def xlora(bench: Bench) -> Any:
    adapters = {}
    for seed in range(2):
        adapters[f"{seed}"] = str(bench.folder / f"{seed}")
        bench.model(seed=seed).float().save_pretrained(adapters[f"{seed}"])
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_depth=2, adapters=adapters)
    model = peft.get_peft_model(bench.base(tiny_llama(use_cache=False)), config)
    for index, p in enumerate(model.base_model.internal_xlora_classifier.parameters()):
        nn.init.constant_(p, 0.1 * (index + 1))
    return logits(model)


WEIGHTED = ("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "magnitude_prune", "magnitude_prune_svd")


@scenario("`add_weighted_adapter`")
def weighted(bench: Bench) -> Any:
    found = []
    for kind in WEIGHTED:
        model = bench.two(r=4, lora_alpha=12, target_modules=TARGETS)
        torch.manual_seed(0)
        density = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type=kind, **density)
        model.set_adapter("sum")
        found.append(logits(model))
    return found


# Hotswapping


@scenario("`hotswap_adapter`", "to a smaller rank", "to another k", "DoRA")
def hotswap(bench: Bench) -> Any:
    bench.model(seed=3).save_pretrained(bench.folder / "same")
    bench.model(seed=3, use_dora=True).save_pretrained(bench.folder / "dora")
    model = bench.model()
    hotswap_adapter(model, str(bench.folder / "same"), "default")
    found = [logits(model)]
    with pytest.raises(ValueError) as error:
        hotswap_adapter(model, str(bench.folder / "dora"), "default")
    return [*found, str(error.value), logits(model)]


@scenario("`prepare_model_for_compiled_hotswap`", "with `target_rank`", "`gralora.prepare_model_for_compiled_hotswap`")
def compiled_hotswap(bench: Bench) -> Any:
    bench.model(seed=3, r=2).save_pretrained(bench.folder / "small")
    bench.model(seed=4, r=6).save_pretrained(bench.folder / "large")
    model = PeftModel.from_pretrained(bench.base(), bench.folder / "small")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    found = []
    for name in ("small", "large", "small"):
        if found:
            hotswap_adapter(compiled, str(bench.folder / name), "default")
        found.append(logits(compiled))
    return found


# Optimizers


@scenario("LoRA+")
def loraplus(bench: Bench) -> Any:
    model = bench.model()
    return bench.train(
        model, optimizers.create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=8)
    )


@scenario("LoRA-FA")
def lorafa(bench: Bench) -> Any:
    model = bench.model()
    return bench.train(model, optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=12, lr=1e-3))


@scenario("Riemannian")
def riemannian(bench: Bench) -> Any:
    if not hasattr(optimizers, "create_riemannian_optimizer"):
        pytest.skip("this PEFT has none")
    model = bench.model()
    optimizer = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=1e-2)
    return bench.train(model, optimizer)


# Saving, merging, converting


@scenario("`save_pretrained`", "Trainer", "`gralora merge`")
def saved(bench: Bench) -> Any:
    model = bench.model()
    found = bench.train(model)
    model.save_pretrained(bench.folder / "adapter")
    base = bench.base()
    loaded = [PeftModel.from_pretrained(base, bench.folder / "adapter")]
    loaded.append(PeftModel.from_pretrained(bench.base(), bench.folder / "adapter", low_cpu_mem_usage=True))
    loaded.append(bench.base())
    loaded[-1].load_adapter(str(bench.folder / "adapter"))
    kept = sorted((bench.folder / "adapter").iterdir())
    return [*found, *map(logits, loaded), [path.name for path in kept]]


@scenario("`inject_adapter_in_model`", "models that are no transformers")
def injected(bench: Bench) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(24, 3)).double()
    model = inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0", "2", "4"]), bench.base(net))
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    state = {
        name.replace(".default", ""): torch.full_like(p, 0.1)
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    peft.set_peft_model_state_dict(model, state)
    return [model(x).detach(), sorted(peft.get_peft_model_state_dict(model))]


@scenario("merge, unmerge", "DoRA merged")
def merged(bench: Bench) -> Any:
    found = []
    for safe, variant in itertools.product((False, True), ({}, {"use_dora": True})):
        model = bench.two(**variant)
        model.base_model.set_adapter(["default", "other"])
        model.merge_adapter(safe_merge=safe)
        found.append(logits(model))
        model.unmerge_adapter()
        found += [logits(model), logits(model.merge_and_unload(safe_merge=safe, adapter_names=["other"]))]
    return found


@scenario("`convert_to_lora`")
def converted(bench: Bench) -> Any:
    if not hasattr(peft, "convert_to_lora"):
        pytest.skip("this PEFT has none")
    model = bench.model()
    config, state = peft.convert_to_lora(model, 3)
    return [config.r, *(state[name].abs() for name in sorted(state))]


@scenario("`path_initial_model")
def mutated_initialisation(bench: Bench) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora")
    model = get_peft_model(bench.base(tiny_llama()), config)
    model.save_pretrained(bench.folder / "initial")
    found = bench.train(model)
    model.save_pretrained(bench.folder / "out", path_initial_model_for_weight_conversion=str(bench.folder / "initial"))
    return [*found, logits(PeftModel.from_pretrained(bench.base(tiny_llama()), bench.folder / "out"))]


@scenario("`reduce_intruder_dimension`")
def intruders(bench: Bench) -> Any:
    model = bench.model()
    reduce_intruder_dimension(model, "default", "reduced", threshold_epsilon=1.0, logging_sink=None)
    model.set_adapter("reduced")
    return [layer.get_delta_weight("reduced").detach() for layer in adapter_layers(model)]


# Running


@scenario("`disable_adapter`")
def disabled(bench: Bench) -> Any:
    model = bench.model()
    with model.disable_adapter():
        found = [logits(model)]
    return [*found, logits(model)]


@scenario("`set_scale`", "`rescale_adapter_scale`")
def scaled(bench: Bench) -> Any:
    model, found = bench.model(), []
    for change in (
        lambda layer: layer.set_scale("default", 0.3),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
    ):
        for layer in adapter_layers(model):
            change(layer)
        found.append(logits(model))
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        return [*found, logits(model)]


@scenario("`get_model_status`")
def status(bench: Bench) -> Any:
    model = bench.two(use_dora=True)
    return [str(model.get_model_status()), [str(layer) for layer in model.get_layer_status()]]


@scenario("`generate`")
def generated(bench: Bench) -> Any:
    return bench.model().generate(IDS, max_new_tokens=5, do_sample=False)


@scenario("gradient checkpointing")
def checkpointing(bench: Bench) -> Any:
    found = []
    for reentrant in (False, True):
        model = bench.model()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found += bench.train(model)
    return found


@scenario("`torch.compile`")
def compiled(bench: Bench) -> Any:
    found = []
    for variant in ({}, {"use_dora": True}):
        torch._dynamo.reset()
        model = bench.model(**variant)
        whole = not variant  # PEFT's DoRA breaks the graph
        found += bench.train(torch.compile(model, backend="aot_eager", fullgraph=whole), use_cache=False)
    return found


def embedded(bench: Bench) -> nn.Module:
    """A small model of an embedding and a linear layer, both adapted."""
    torch.manual_seed(0)
    base = bench.base(nn.Sequential(OrderedDict(embedding=nn.Embedding(9, 6), linear=nn.Linear(6, 5))).double())
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embedding", "linear"])
    return randomize(get_peft_model(base, config, autocast_adapter_dtype=False)).eval()


@scenario("`torch.func`")
def functional(bench: Bench) -> Any:
    model, tokens = embedded(bench), torch.tensor([[1, 2, 1], [8, 0, 4]])
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def f(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (tokens,)).tanh()

    ensemble = vmap(f)({name: torch.stack([p, -p]) for name, p in params.items()})
    gradients = grad(lambda params: f(params).sum())(params)
    y = model(tokens)
    factors = [p for p in model.parameters() if p.requires_grad]
    batch = torch.autograd.grad(y, factors, torch.stack([y, -y]).detach(), is_grads_batched=True)
    return [ensemble, *gradients.values(), *jvp(f, (params,), (params,)), *jacrev(f)(params).values(), *batch]


@scenario("`torch.jit.trace`")
def traced(bench: Bench) -> Any:
    model = embedded(bench)
    return [torch.jit.trace(model, torch.tensor([[1, 2]]))(torch.tensor([[3], [7], [3]])), model(torch.tensor([5]))]


@scenario("`torch.onnx.export`")
def onnx_file(bench: Bench) -> Any:
    pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model, tokens, file = embedded(bench).float(), torch.tensor([[1, 2, 1], [8, 0, 4]]), io.BytesIO()
    torch.onnx.export(model, (tokens,), file, dynamo=False, input_names=["tokens"])
    (found,) = ReferenceEvaluator(file.getvalue()).run(None, {"tokens": tokens.numpy()})
    y = model(tokens)
    torch.testing.assert_close(torch.from_numpy(found), y.detach(), rtol=1e-5, atol=1e-5)
    return y.double()


@scenario("copy, pickle")
def copied(bench: Bench) -> Any:
    model = bench.model()
    twin = copy.deepcopy(model)
    torch.save(model, bench.folder / "model.pt")
    again = torch.load(bench.folder / "model.pt", weights_only=False)
    trained = bench.train(twin)
    return [*trained, logits(model), logits(again)]


BLOCKWISE = [
    "True`, `False",
    '"gaussian"',
    '"orthogonal"',
    '"eva"',
    '"mica"',
    '"pissa"',
    '"pissa_niter_[n]"',
    '"olora"',
]
BLOCKWISE += ['"corda"', '"lora_ga"', '"loftq"']
# Rows of the page that are about GraLoRA's own, or are run elsewhere
ELSEWHERE = {
    "`gralora_k_pattern`": "GraLoRA's",
    "LoRA-Muon": "GraLoRA's",
    **dict.fromkeys(map("`{}`".format, BLOCKWISE), "what each block of a grid gets"),
    '`gralora_k="auto"`': "GraLoRA's",
    "tensor parallelism": "hooks on the factors keep PEFT's forward: test_describe_gives_reasons",
    "DeepSpeed ZeRO-3": "hooks on modules keep PEFT's forward",
}


# Scenarios in which PEFT's forward runs, or none; torch.compile fuses small layers' operations on a CPU by itself
NOT_FUSED = ("lora_bias", "experts", "arrow", "variants", "alora", "mixed_batch", "xlora", "compiled")
NOT_FUSED += ("compiled_hotswap", "status", "converted", "intruders")


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, Tensor):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5 if wanted.dtype == torch.float32 else 1e-9)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for own, theirs in zip(found, wanted, strict=True):
            same(own, theirs)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", SCENARIOS)
def test_feature_is_pefts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scenario computes the same with stock layers, and with accelerated ones, which do run as one operation."""
    wanted = SCENARIOS[name](Bench(False, tmp_path / "stock"))
    calls, one, of_several = [], fast_path.FusedCall.__call__, fast_path.FusedCall.operands
    monkeypatch.setattr(fast_path.FusedCall, "__call__", lambda self, x: (calls.append(1), one(self, x))[1])
    monkeypatch.setattr(fast_path.FusedCall, "operands", lambda self: (calls.append(1), of_several(self))[1])
    found = SCENARIOS[name](Bench(True, tmp_path / "fast"))
    assert bool(calls) != (name in NOT_FUSED)
    same(found, wanted)


def test_every_row_is_run() -> None:
    """Each row of the page is in a scenario, or is named as one that is not for plain LoRA."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if re.match(r"\| .*::test_", line)]
    assert len(rows) > 50
    beginnings = [*itertools.chain.from_iterable(COVERS.values()), *ELSEWHERE]
    assert not [row for row in rows if not row.startswith(tuple(beginnings))]
    assert not [start for start in beginnings if not any(row.startswith(start) for row in rows)]
