"""GraLoRA of nn.Embedding: the linear grid on one-hot token ids, with the vocabulary as input features."""

import copy

import peft
import pytest
import torch
from helpers import (
    Case,
    OneLayer,
    adapted,
    adapter_parameters,
    assert_accurate,
    assert_close64,
    assert_unchanged,
    case_config,
    gralora_config,
    naive_delta,
    naive_update,
    only_layer,
    random_input,
    tiny_gpt2,
    tiny_llama,
    token_ids,
)
from helpers import factors_of as linear_factors_of
from kinds_table import embedding_factors as factors_of
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import gralora
from gralora import LoraConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
]
CASES = [  # in_features is the vocabulary
    Case(1, 4, 0, 12, 20),
    Case(2, 4, 0, 12, 20),
    Case(2, 7, 3, 20, 12),
    Case(4, 10, 2, 24, 16),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def one_embedding(case, cls=nn.Embedding, **options):
    embedding = cls(case.in_features, case.out_features, **options)
    embedding.weight.data = random_input(case.in_features, case.out_features, seed=2)
    return OneLayer(embedding.double())


def tokens(case, *shape):
    return torch.randint(case.in_features, shape, generator=torch.Generator().manual_seed(3))


def one_hot(ids, case):
    return nn.functional.one_hot(ids, case.in_features).double()


@cases
@pytest.mark.parametrize("batch", [(), (7,), (2, 3), (0,)], ids=str)
def test_output_and_gradients_equal_the_block_loop(case, batch):
    """The output is W[ids] plus the block loop on one-hot ids; so are the gradients, and the weight gets none."""
    model = adapted(one_embedding(case), case_config(case)).train()
    layer, ids = only_layer(model), tokens(case, *batch)
    x, dy = one_hot(ids, case), random_input(*batch, case.out_features, seed=9)
    parameters = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    expected = x @ layer.base_layer.weight + 3 * naive_update(x, factors_of(layer, case.hybrid_r))
    gradients = torch.autograd.grad(expected, parameters, dy)
    out = model(ids)
    assert_close64(out, expected)
    out.backward(dy)
    for p, grad in zip(parameters, gradients, strict=True):
        assert_close64(p.grad, grad)
    assert layer.base_layer.weight.grad is None


@cases
def test_each_place_of_the_exchange(case):
    """h_i = A_i[token]; output block j gets its j-th sub-rank through the i-th sub-rank of B_j, and nothing else."""
    model = adapted(one_embedding(case), case_config(case))
    layer, chunk, q = only_layer(model), case.in_features // case.k, case.r_g // case.k
    A, B, hybrid_A, hybrid_B = factors_of(layer, case.hybrid_r)
    for token in range(case.in_features):
        i = token // chunk
        h = A[i, token % chunk]
        y = torch.cat([h[j * q : (j + 1) * q] @ B[j, i * q : (i + 1) * q] for j in range(case.k)])
        if case.hybrid_r:
            y = y + hybrid_B @ hybrid_A[:, token]
        assert_close64(layer.update("default", torch.tensor(token)), 3 * y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("safe", [False, True])
def test_merge_in_half_precision_rounds_once(dtype, safe):
    case = CASES[-1]
    model = adapted(one_embedding(case).to(dtype), case_config(case), autocast_adapter_dtype=False)
    layer = only_layer(model)
    weight, dW = layer.base_layer.weight.double(), 3 * naive_delta(factors_of(layer.double(), case.hybrid_r)).T
    layer.to(dtype)
    model.merge_adapter(safe_merge=safe)
    assert layer.base_layer.weight.dtype == dtype
    assert_accurate(layer.base_layer.weight, weight + dW, (weight + dW).to(dtype))
    merged = layer.base_layer.weight.double()
    model.unmerge_adapter()
    assert_accurate(layer.base_layer.weight, weight, (merged - dW).to(dtype))


@cases
def test_start_is_that_of_plain_lora(case):
    """A is zero and B PEFT's normal numbers, so the output is the base's; as many parameters as LoRA."""
    models = []
    for config in (case_config(case), peft.LoraConfig(r=case.r, target_modules=["layer"])):
        torch.manual_seed(0)
        models.append(get_peft_model(one_embedding(case), config))
    ours, plain = map(only_layer, models)
    assert not ours.lora_embedding_A["default"].any()
    B = ours.lora_embedding_B["default"].flatten(0, 1)
    assert torch.equal(B, plain.lora_embedding_B["default"]) and B.any()
    ids = torch.arange(case.in_features)
    assert torch.equal(models[0](ids), ours.base_layer(ids))
    counts = [sum(p.numel() for p in adapter_parameters(model).values()) for model in models]
    assert counts[0] == counts[1] == case.r * (case.in_features + case.out_features)


@pytest.mark.parametrize("options", [{"padding_idx": 5}, {"scale_grad_by_freq": True}], ids=str)
def test_options_of_the_embedding(options):
    """A padding token's row of A gets no gradient, and frequent tokens' rows a smaller one, as those of the weight."""
    case = CASES[1]
    model = adapted(one_embedding(case, **options), case_config(case)).train()
    layer, ids = only_layer(model), torch.tensor([5, 5, 7, 7, 7, 1])
    layer.base_layer.weight.requires_grad_()
    dy = random_input(case.out_features).expand(6, -1)
    plain = nn.Embedding(case.in_features, case.r, **options).double()
    plain.weight.data = layer.lora_embedding_A["default"].data.flatten(1).T
    place = one_hot(ids // 6, Case(2, 0, 0, 2, 0))
    h = plain(ids).unflatten(-1, (2, 2))
    B = layer.lora_embedding_B["default"].detach().unflatten(2, (2, 2))  # [k_j, O/k, k_i, q]
    y = 3 * torch.einsum("tjq,ti,joiq->tjo", h, place, B).flatten(1)
    model(ids).backward(dy)
    y.backward(dy)
    assert_close64(layer.lora_embedding_A["default"].grad.flatten(1).T, plain.weight.grad)


def test_scaled_embedding():
    """Gemma's embedding multiplies its output; the adapter's is multiplied as well, so that merging is exact."""
    case = CASES[-1]
    base = one_embedding(case, Gemma3TextScaledWordEmbedding, padding_idx=0, embed_scale=4.0)
    ids = torch.arange(case.in_features)
    model = adapted(copy.deepcopy(base), case_config(case))
    update = naive_update(one_hot(ids, case), factors_of(only_layer(model), case.hybrid_r))
    assert_close64(model(ids), base(ids) + 4 * 3 * update)
    assert_close64(model.merge_and_unload()(ids), base(ids) + 4 * 3 * update)


# Models


EMBEDDINGS = {"llama": (tiny_llama, ["embed_tokens", "q_proj"]), "gpt2": (tiny_gpt2, ["wte", "wpe", "c_attn"])}


@pytest.mark.parametrize("build, targets", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("low_memory", [False, True])
def test_save_and_load(build, targets, low_memory, tmp_path):
    """A fresh model with the saved adapter has the same tensors, bit by bit, and the same output."""
    model = adapted(build(torch.float64), gralora_config(2, hybrid_r=2, target_modules=targets))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(torch.float64), tmp_path, low_cpu_mem_usage=low_memory)
    saved = adapter_parameters(model)
    assert any("lora_embedding_A" in name for name in saved)
    for name, p in adapter_parameters(loaded).items():
        assert torch.equal(p, saved.pop(name)), name
    assert not saved
    ids = token_ids(2, 7)
    logits = model(ids).logits
    assert torch.equal(loaded(ids).logits, logits)
    with loaded.disable_adapter():
        assert (loaded(ids).logits - logits).abs().max() > 0.01


TIED = {
    "input": (["embed_tokens"], {}),
    "output": (["lm_head"], {}),
    "both": (["embed_tokens", "lm_head"], {}),
    "tied-adapters": (["embed_tokens", "lm_head"], {"ensure_weight_tying": True}),
}


@pytest.mark.parametrize("targets, fields", TIED.values(), ids=TIED)
def test_tied_embeddings_behave_as_with_plain_lora(targets, fields):
    """On a shared weight, forward, merge, unmerge and unload give what plain LoRA gives with the same dW (k = 1)."""
    ids, results, generator = token_ids(2, 7), [], torch.Generator().manual_seed(0)
    models = []
    for gralora_fields in ({"use_gralora": True, "gralora_k": 1}, {}):
        base = tiny_llama(torch.float64, tie_word_embeddings=True)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **fields, **gralora_fields)
        models.append(adapted(base, config))
    parameters = map(adapter_parameters, models)
    for (name, ours), plain in zip(next(parameters).items(), next(parameters).values(), strict=True):
        plain.data.copy_(torch.randn(plain.shape, generator=generator, dtype=torch.float64))
        ours.data.copy_(plain.data.view_as(ours) if "embedding" in name else plain.data.T.unsqueeze(0))
    for model in models:
        logits = [model(ids).logits]
        model.merge_adapter()
        logits.append(model(ids).logits)
        model.unmerge_adapter()
        results.append([*logits, model(ids).logits, model.merge_and_unload()(ids).logits])
    for ours, plain in zip(*results, strict=True):
        assert_close64(ours, plain)


@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_tied_factors(hybrid_r, tmp_path):
    """With ensure_weight_tying the output layer's dW is the embedding's, from factors in the same memory."""
    config = gralora_config(4, 10 if hybrid_r else 8, hybrid_r, target_modules=["embed_tokens", "lm_head"])
    config.ensure_weight_tying = True
    model = adapted(tiny_llama(torch.float64, tie_word_embeddings=True), config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    dW = head.get_delta_weight("default")
    assert_close64(dW, 2 * naive_delta(linear_factors_of(head)))
    assert_close64(dW, embedding.get_delta_weight("default"))
    x = random_input(3, 16)
    assert_close64(head(x), x @ (head.base_layer.weight + dW).T)
    with torch.no_grad():
        embedding.lora_embedding_A["default"].mul_(2)
    assert_close64(head.get_delta_weight("default"), 2 * dW)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(torch.float64, tie_word_embeddings=True), tmp_path)
    ids = token_ids(2, 7)
    assert_close64(loaded(ids).logits, model(ids).logits)


# What is refused


REFUSED = {
    "vocabulary": ({}, {"k": 4}, (10, 8), ["gralora_k=4", "'layer'", "in_features=10", "nn.Embedding", "[1, 2]"]),
    "dimension": ({}, {"k": 4}, (8, 6), ["gralora_k=4", "'layer'", "out_features=6"]),
    "max_norm": ({"max_norm": 1.0}, {}, (8, 8), ["max_norm=1.0", "'layer'"]),
    "sparse": ({"sparse": True}, {}, (8, 8), ["sparse=True", "'layer'"]),
    "lora_bias": ({}, {"lora_bias": True}, (8, 8), ["lora_bias=True", "'layer'", "nn.Embedding"]),
}


@pytest.mark.parametrize("options, fields, sizes, parts", REFUSED.values(), ids=REFUSED)
def test_refused(options, fields, sizes, parts):
    model = OneLayer(nn.Embedding(*sizes, **options))
    with assert_unchanged(model, torch.arange(8)), pytest.raises(ValueError) as error:
        get_peft_model(model, gralora_config(**{"k": 2, "target_modules": ["layer"]} | fields))
    for part in parts:
        assert part in str(error.value)


def test_auto_k_counts_the_vocabulary():
    """gralora_k="auto" takes a k that divides the vocabulary; with one of odd size that is 1, with a warning."""
    for vocabulary, k in ((32, 4), (34, 2)):
        model = tiny_llama(vocab_size=vocabulary)
        config = gralora_config("auto", 64, target_modules=["embed_tokens", "q_proj"])
        settled = get_peft_model(model, config).peft_config["default"]
        assert settled.of_layer("gralora_k", "model.embed_tokens") == k
        assert settled.of_layer("gralora_k", "model.layers.0.self_attn.q_proj") == 4
    with pytest.warns(UserWarning, match="found no k > 1"):
        get_peft_model(tiny_llama(vocab_size=33), gralora_config("auto", 64, target_modules=["embed_tokens"]))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast", "mixed"], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1, "scale_grad_by_freq": True}], ids=["", "options"])
def test_one_operation(case, dtype, options):
    """The adapter is added in place, at most twice as far from float64 as by the definition, and keeps no mask."""
    base_dtype = {"autocast": torch.float32, "mixed": torch.bfloat16}.get(dtype, dtype)
    model = adapted(one_embedding(case, **options), case_config(case)).train()
    model.to(base_dtype)
    layer, ids = only_layer(model), tokens(case, 3, 101)
    parameters = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    for p in parameters:
        p.data = p.data.to(torch.float32 if dtype in ("autocast", "mixed") else base_dtype)
    assert layer.fused_call(ids) is not None and gralora.describe(model).startswith("1 of 1")

    def results(compute):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            y = compute()
        return [y, *torch.autograd.grad(y, parameters, random_input(*y.shape, seed=9).to(y.dtype))]

    def by_definition():
        y = layer.base_layer(ids)
        return (y + layer.update("default", ids)).to(y.dtype)

    found, plain = results(lambda: model(ids)), results(by_definition)
    exact = copy.deepcopy(model).double()
    layer, dtype = only_layer(exact), None
    parameters = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    for own, expected, theirs in zip(found, results(by_definition), plain, strict=True):
        assert_accurate(own, expected, theirs)


def test_second_derivatives_and_one_gradient_alone():
    case = CASES[-1]
    model, ids = adapted(one_embedding(case), case_config(case)).train(), tokens(case, 2, 3)
    layer = only_layer(model)
    parameters, found = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]], []
    for compute in (lambda: model(ids), lambda: layer.base_layer(ids) + layer.update("default", ids)):
        gradients = torch.autograd.grad(1e-2 * compute().square().mean(), parameters, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters))
    for own, expected in zip(*found, strict=True):
        assert_close64(own, expected)
    wanted = torch.autograd.grad((layer.base_layer(ids) + layer.update("default", ids)).square().sum(), parameters)
    for p, gradient in zip(parameters, wanted, strict=True):
        model.requires_grad_(False)
        p.requires_grad_(True)
        model(ids).square().sum().backward()
        assert_close64(p.grad, gradient)


def test_checkpointed_and_hooked():
    """Recomputed blocks give the same gradients; what a hook on the base layer saw is not changed afterwards."""
    case = CASES[2]
    model, ids = adapted(one_embedding(case), case_config(case)).train(), tokens(case, 2, 3)
    layer, seen = only_layer(model), []
    wanted = model(ids)
    model(ids).square().sum().backward()
    gradients = [p.grad.clone() for p in adapter_parameters(model).values()]
    model.zero_grad()
    checkpoint(model, ids, use_reentrant=False).square().sum().backward()
    for p, gradient in zip(adapter_parameters(model).values(), gradients, strict=True):
        assert_close64(p.grad, gradient)
    layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    assert_close64(model(ids), wanted)
    assert_close64(seen[0], layer.base_layer.weight[ids])
