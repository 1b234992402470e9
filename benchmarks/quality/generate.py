"""Greedy generation for many prompts at once, with adapters merged and, on a GPU, one CUDA graph for a token.

transformers' `generate` waits for the launches of a model this small, and takes longer than the training that it
tests; the tokens are the same.
"""

import copy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface


class Cache:
    """Keys and values of every layer in memory that stays in place; `slots` are those to be written next."""

    def __init__(self, layers: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.pairs = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
        self.slots: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        pair = self.pairs[layer]
        for held, new in zip(pair, (keys, values), strict=True):
            held.index_copy_(2, self.slots, new)
        return pair


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The query heads that share a key head as more queries of that head, so that no key is copied."""
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    query = query.reshape(batch, key.shape[1], groups * length, width)
    out = F.scaled_dot_product_attention(query, key, value, mask.repeat(1, 1, groups, 1), scale=scaling)
    return out.view(batch, heads, length, width).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)


class Generator:
    """Continues a fixed set of prompts with the weights that an adapted model has at the time."""

    @torch.no_grad()
    def __init__(self, lm: nn.Module, prompts: list[list[int]], new_tokens: int, end: int) -> None:
        """Make the buffers; on a GPU, capture the step.

        Args:
            lm: a causal LM of the Llama family, with or without PEFT's layers in it.
            end: the id that ends an answer, and fills up the prompts on the left.
        """
        self.lm, self.end, self.new_tokens = lm, end, new_tokens
        device = next(lm.parameters()).device
        cuda = device.type == "cuda"
        config = copy.deepcopy(lm.config)
        config._attn_implementation = "grouped"
        with torch.device(device):
            self.plain = type(lm)(config).eval().requires_grad_(False)
        for p in self.plain.parameters():  # not the rotary frequencies, which are a buffer
            p.data = p.data.to(torch.bfloat16 if cuda else torch.float32)
        self.decoder = self.plain.model
        rows, self.width = len(prompts), max(map(len, prompts))
        padding = torch.tensor([self.width - len(prompt) for prompt in prompts], device=device)
        self.prompts = torch.tensor([[end] * (self.width - len(p)) + p for p in prompts], device=device)
        self.padding = padding[:, None]
        length = self.width + new_tokens
        shape = (rows, config.num_key_value_heads, length, self.decoder.layers[0].self_attn.head_dim)
        self.cache = Cache(config.num_hidden_layers, shape, self.plain.lm_head.weight)
        self.slots = torch.arange(length, device=device)
        self.slot = torch.full((1,), self.width, device=device)  # of the token that is fed next
        self.next = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.replies = torch.zeros(rows, new_tokens, dtype=torch.long, device=device)
        self.step = self._step
        if cuda:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # allocates and chooses kernels before anything is captured
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.step = graph.replay

    def _forward(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """The likeliest next token, `[rows, 1]`, after tokens `[rows, n]` in these slots `[n]` of the cache."""
        self.cache.slots = slots
        x = self.decoder.embed_tokens(tokens)
        rotary = self.decoder.rotary_emb(x, (slots - self.padding).clamp(min=0))
        seen = (self.slots <= slots[:, None]) & (self.slots >= self.padding[:, None])
        seen |= self.slots == slots[:, None]  # what fills up sees itself: a softmax over nothing is no number
        for layer in self.decoder.layers:
            x = layer(
                x, attention_mask=seen[:, None], position_embeddings=rotary, past_key_values=self.cache, use_cache=True
            )
        return self.plain.lm_head(self.decoder.norm(x[:, -1:])).argmax(-1)

    def _step(self) -> None:
        token = self._forward(self.next, self.slot)
        self.slot += 1
        self._note(token)

    def _note(self, token: Tensor) -> None:
        """Token `[rows, 1]` as what `slot` is fed next; replies that have ended are filled up."""
        self.next.copy_(torch.where(self.done[:, None], self.end, token))
        self.done |= self.next[:, 0] == self.end
        self.replies.index_copy_(1, self.slot - self.width, self.next)

    def merge(self) -> None:
        """Take over the weights of `lm` as they are now, adapters merged."""
        weights = {n.replace(".base_layer", ""): w for n, w in self.lm.state_dict().items() if "lora_" not in n}
        for name, module in self.lm.named_modules():
            if isinstance(module, LoraLayer):
                weights[f"{name}.weight"] = weights[f"{name}.weight"].float() + module.get_delta_weight("default")
        self.plain.load_state_dict(weights)

    @torch.no_grad()
    def __call__(self) -> list[list[int]]:
        """The replies, each of `new_tokens` tokens, filled up with `end`."""
        self.merge()
        self.done.zero_()
        self.replies.fill_(self.end)
        self.slot.fill_(self.width)
        self._note(self._forward(self.prompts, self.slots[: self.width]))
        for number in range(1, self.new_tokens):
            if number % 16 == 0 and self.done.all():
                break
            self.step()
        return self.replies.tolist()
