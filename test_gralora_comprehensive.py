"""GraLoRA in eight demonstrations, each of which checks what it prints.

Run `python test_gralora_comprehensive.py` to read along, or `pytest test_gralora_comprehensive.py`.
The thorough tests are in `tests/`.
"""

import tempfile

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from gralora import LoraConfig

IN, OUT = 160, 128


class TwoLayers(nn.Module):
    """A small base model; both layers are adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(IN, OUT)
        self.down = nn.Linear(OUT, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def config(**fields) -> LoraConfig:
    return LoraConfig(**{"use_gralora": True, "r": 16, "lora_alpha": 32, "target_modules": ["up", "down"]} | fields)


def build(random: bool = True, **fields) -> PeftModel:
    """A float64 GraLoRA model; `random` also fills B, which starts at zero, so that the adapter does something."""
    model = get_peft_model(TwoLayers().double(), config(**fields))
    if random:
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if ".lora_" in name:
                nn.init.normal_(p, std=0.2)
    return model.eval()


def adapted_layer(model: PeftModel, name: str = "up") -> peft.tuners.lora.Linear:
    return getattr(model.base_model.model, name)


def some_input(*batch: int) -> torch.Tensor:
    return torch.randn(*batch, IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-10)


def test_1_shapes() -> None:
    """The grid's factors have one slice per block; the output has the base layer's shape for any batch."""
    for k in (1, 2, 4, 8):
        model = build(gralora_k=k)
        A, B = adapted_layer(model).lora_A["default"].weight, adapted_layer(model).lora_B["default"].weight
        assert A.shape == (k, IN // k, 16) and B.shape == (k, 16, OUT // k)
        for batch in [(5,), (2, 3), (2, 1, 3), (0,)]:
            assert model(some_input(*batch)).shape == (*batch, IN)
        print(f"k={k}: A {tuple(A.shape)}, B {tuple(B.shape)}")


def test_2_block_structure() -> None:
    """Block (j, i) of dW is made from A_i and B_j alone, with rank r / k; together they reach rank k * r."""
    k, q, scaling = 4, 16 // 4, 32 / 16
    layer = adapted_layer(build(gralora_k=k))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dW = layer.get_delta_weight("default")
    for j, row in enumerate(dW.chunk(k, dim=0)):
        for i, block in enumerate(row.chunk(k, dim=1)):
            assert close(block, scaling * (A[i][:, j * q : (j + 1) * q] @ B[j][i * q : (i + 1) * q]).T)
            assert torch.linalg.matrix_rank(block) == q
    rank, lora_rank = torch.linalg.matrix_rank(dW).item(), 16
    assert rank == k * lora_rank
    print(f"dW has {k} x {k} blocks of rank {q}; its rank is {rank}, that of LoRA with as many parameters {lora_rank}")


def test_3_forward_with_exchange() -> None:
    """Every block's sub-ranks go to all output blocks, so one input chunk moves the whole output."""
    k, q, scaling = 4, 16 // 4, 32 / 16
    model = build(gralora_k=k)
    layer, x = adapted_layer(model), some_input(5)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    h = [chunk @ A[i] for i, chunk in enumerate(x.chunk(k, dim=-1))]
    g = [torch.cat([h_i[:, j * q : (j + 1) * q] for h_i in h], dim=-1) for j in range(k)]
    y = torch.cat([g[j] @ B[j] for j in range(k)], dim=-1)
    assert close(layer(x), layer.base_layer(x) + scaling * y)

    one_chunk = torch.zeros_like(x)
    one_chunk[:, : IN // k] = x[:, : IN // k]
    update = layer(one_chunk) - layer.base_layer(one_chunk)
    moved = [block.abs().max().item() > 1e-3 for block in update.chunk(k, dim=-1)]
    assert all(moved)
    print(f"forward equals the block loop; the first input chunk moves {sum(moved)} of {k} output blocks")


def test_4_pure_and_hybrid() -> None:
    """Hybrid GraLoRA gives part of the rank to a plain LoRA, at the same number of parameters and the same scaling."""
    x, counts = some_input(5), {}
    for hybrid_r in (0, 8):
        model = build(gralora_k=4, hybrid_r=hybrid_r)
        layer = adapted_layer(model)
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        assert A.weight.shape[2] == 16 - hybrid_r and (A.hybrid_weight is None) == (hybrid_r == 0)
        counts[hybrid_r] = model.get_nb_trainable_parameters()[0]
        assert layer.scaling["default"] == 32 / 16
    with torch.no_grad():
        B.weight.zero_()  # of the hybrid model: what is left is the plain LoRA part
        plain = x @ A.hybrid_weight.T @ B.hybrid_weight.T
        assert close(layer(x), layer.base_layer(x) + 2.0 * plain) and plain.abs().max() > 0.1
    assert counts[0] == counts[8]
    print(f"pure and hybrid both train {counts[0]} parameters; the hybrid part is a plain LoRA of rank 8")


def test_5_merge_and_unmerge() -> None:
    """Merging moves the adapter into the weights without changing the output; unmerging takes it out again."""
    for fields in ({"gralora_k": 2}, {"gralora_k": 4, "hybrid_r": 4}):
        model, x = build(**fields), some_input(5)
        weight, before = adapted_layer(model).base_layer.weight.detach().clone(), model(x)
        model.merge_adapter()
        change = (adapted_layer(model).base_layer.weight - weight).abs().max().item()
        assert close(model(x), before) and change > 0.1
        model.unmerge_adapter()
        assert close(adapted_layer(model).base_layer.weight, weight) and close(model(x), before)
        merged = model.merge_and_unload()
        assert type(merged.up) is nn.Linear and close(merged(x), before)
        print(f"{fields}: merged weights differ by up to {change:.2f}, outputs do not")


def test_6_save_and_load() -> None:
    """A saved adapter is loaded bit by bit, with the settings it was made with."""
    for fields in ({"gralora_k": 1}, {"gralora_k": 4, "hybrid_r": 4}, {"gralora_k": "auto"}):
        model, x = build(**fields), some_input(5)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(TwoLayers().double(), folder)
            saved = PeftConfig.from_pretrained(folder)
        assert torch.equal(loaded(x), model(x)) and not torch.equal(loaded(x), TwoLayers().double()(x))
        assert isinstance(saved, LoraConfig) and saved.use_gralora
        assert saved.gralora_k == adapted_layer(model).lora_A["default"].weight.shape[0]
        print(f"{fields}: loaded with k={saved.gralora_k}, hybrid_r={saved.hybrid_r}; the output is the same")


def test_7_training_gradients() -> None:
    """Training starts at the base model, trains the adapter only and all of it, and reduces the loss."""
    model, x = build(random=False, gralora_k=4, hybrid_r=4).train(), some_input(64)
    target = some_input(64).roll(1, dims=-1)
    assert torch.equal(model(x), TwoLayers().double()(x))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=1e-2), []
    for step in range(30):
        loss = nn.functional.mse_loss(model(x), target)
        losses.append(loss.item())
        loss.backward()
        if step > 0:  # in the first step B is zero, and so are the gradients of A
            assert all(p.grad.isfinite().all() and p.grad.any() for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in name) == (not torch.equal(p, start[name])), name
    assert losses[-1] < 0.7 * losses[0]
    print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps; all {len(trainable)} adapter tensors moved"
    )


def test_8_parameter_efficiency() -> None:
    """GraLoRA trains exactly as many parameters as LoRA at the same r, for every k and hybrid_r."""
    lora = get_peft_model(TwoLayers(), peft.LoraConfig(r=16, target_modules=["up", "down"]))
    expected, _ = lora.get_nb_trainable_parameters()
    assert expected == 2 * 16 * (IN + OUT)
    for k in (1, 2, 4, 8):
        for hybrid_r in (0, 8):
            model = build(gralora_k=k, hybrid_r=hybrid_r)
            count, total = model.get_nb_trainable_parameters()
            rank = torch.linalg.matrix_rank(adapted_layer(model).get_delta_weight("default")).item()
            assert count == expected and rank == k * (16 - hybrid_r) + hybrid_r
            print(f"k={k}, hybrid_r={hybrid_r}: {count} of {total} parameters, as LoRA; rank of dW {rank}")


if __name__ == "__main__":
    demonstrations = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    for name, demonstration in demonstrations:
        print(f"\n{name}: {demonstration.__doc__}")
        demonstration()
    print(f"\nAll {len(demonstrations)} demonstrations passed.")
