"""Packing, which is TRL's: no example is lost or cut, and none sees another one in its row."""

import itertools
import random

import pytest
import torch
from datasets import Dataset
from helpers import gralora_config
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from gralora.tool.data.packing import check_packing

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
MODELS = {
    "llama": lambda attention: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention)),
    "gpt2": lambda attention: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_implementation=attention)
    ),
}


def rows(*lengths: int) -> list[dict[str, list[int]]]:
    drawn = random.Random(0)
    ids = [[drawn.randrange(64) for _ in range(length)] for length in lengths]
    return [{"input_ids": one, "attention_mask": [1] * len(one), "labels": [-100, *one[1:]]} for one in ids]


def packed(examples: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    return list(pack_dataset(Dataset.from_list(examples).select_columns(["input_ids", "labels"]), length))


def test_every_example_is_in_one_row_and_rows_are_full():
    drawn = random.Random(1)
    lengths = [drawn.randrange(1, 101) for _ in range(2007)]
    examples = rows(*lengths)
    packs = packed(examples, 100)
    documents = []
    for row in packs:
        ends = list(itertools.accumulate(row["seq_lengths"]))
        documents += [row["input_ids"][start:end] for start, end in itertools.pairwise([0, *ends])]
    assert sorted(documents) == sorted(row["input_ids"] for row in examples)
    sizes = [len(row["input_ids"]) for row in packs]
    assert max(sizes) <= 100
    assert sum(size <= 50 for size in sizes) <= 3, "two half empty rows of one batch would fit into one"
    assert sum(sizes) / len(sizes) > 95


@pytest.fixture(params=[(name, attention) for name in MODELS for attention in ("sdpa", "eager")], ids="-".join)
def model(request):
    """With an adapter of random factors."""
    name, attention = request.param
    torch.manual_seed(0)
    config = gralora_config(2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(MODELS[name](attention), config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_packed_logits_are_those_of_each_example_alone(model):
    examples = rows(5, 9, 3, 7)
    batch = collate(packed(examples, 17))
    order = batch["cu_seq_lens_q"].diff().tolist()
    examples = [next(row for row in examples if len(row["input_ids"]) == size) for size in order]
    assert batch["input_ids"].shape == (1, 24) and "attention_mask" not in batch
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0].split(order)
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in examples]
        unaware = model(input_ids=batch["input_ids"]).logits[0].split(order)
    for got, expected, other in zip(together, alone, unaware, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(expected, alone[0]) or (other - expected).abs().max() > 0.1
    check_packing(model, "base")


def test_nothing_is_learnt_across_a_boundary():
    first, second = rows(4, 3)
    first["labels"] = first["input_ids"]  # as if the first token were learnt
    batch = collate(packed([first, second], 7))
    assert batch["labels"].tolist() == [[-100, *first["input_ids"][1:], -100, *second["input_ids"][1:]]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_a_model_that_mixes_packed_texts_is_refused(model):
    """Here one that takes positions to go on, and a mask of ones, from which transformers sees a single text."""

    def as_one_text(_, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return args, kwargs | {"attention_mask": torch.ones_like(ids), "position_ids": positions}

    base = model.get_base_model()
    getattr(base, base.base_model_prefix).register_forward_pre_hook(as_one_text, with_kwargs=True)
    with pytest.raises(ValueError, match="base_model='mixer' does not keep packed texts apart"):
        check_packing(model, "mixer")
