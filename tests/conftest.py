"""Fixtures that several test files share."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gralora.tool import embedded

torch.set_num_threads(1)  # the models here are so small that more threads only wait for each other


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    """Forget what other test files compiled: the compiler counts how often one line of ours was, over all models."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and a tokenizer of bytes, as a folder for `from_pretrained`."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["def add(a, b): return a + b"] * 4, vocab_size=270, special_tokens=["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embedded_stand_in(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder, for GRALORA_CACHE, in which the embedded model is the tiny one, with room for 1024 tokens."""
    cache = tmp_path_factory.mktemp("cache")
    shutil.copytree(tiny_model, cache / embedded.MODEL)
    path = cache / embedded.MODEL / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 1024}))  # rotary: no weights
    return cache
