"""How large an adapter's update is after some steps of Adam, for LoRA and for grids: the check of docs/gralora.md.

    python benchmarks/update_size.py --out benchmarks/results/update-size.json

One linear layer whose loss is -<G, dW> plus noise, so that the gradient of full fine-tuning is G at every step, and
nothing converges: what is left is how Adam's steps on A and B add up in dW. Runs on the CPU in seconds.
"""

import argparse
import json
import statistics
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

import gralora

STEPS = (1, 10, 100, 1000)
SIZE, R, LR = 256, 64, 1e-3


def gradient(rank: int, seed: int) -> Tensor:
    """A Gaussian matrix of the given rank, `[O, I]`, entries of mean square 1."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(SIZE, rank, generator=generator) for _ in range(2))
    return left @ right.T / rank**0.5


def update_sizes(
    config: peft.LoraConfig, G: Tensor, noise: float, seed: int, steps: tuple[int, ...] = STEPS
) -> dict[int, tuple[float, float]]:
    """Steps -> root mean square of dW's entries, and of its part along G."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)), config)
    layer = model.base_model.model[0]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=LR)
    inputs, generator = torch.eye(SIZE), torch.Generator().manual_seed(seed)
    sizes = {}
    for step in range(1, steps[-1] + 1):
        noisy = G + noise * torch.randn(G.shape, generator=generator) if noise else G
        optimizer.zero_grad()
        (-(model(inputs) * noisy.T).sum()).backward()
        optimizer.step()
        if step in steps:
            dW = layer.get_delta_weight("default").detach()
            sizes[step] = (dW.square().mean().sqrt().item(), ((dW * G).sum() / G.norm()).item() / SIZE)
    return sizes


def configs() -> dict[str, peft.LoraConfig]:
    common = {"r": R, "lora_alpha": R, "target_modules": ["0"]}
    grids = {f"GraLoRA k={k}": gralora.LoraConfig(use_gralora=True, gralora_k=k, **common) for k in (2, 4, 8)}
    hybrid = gralora.LoraConfig(use_gralora=True, gralora_k=4, hybrid_r=R // 2, **common)
    return {"LoRA": peft.LoraConfig(**common), **grids, f"GraLoRA k=4 hybrid_r={R // 2}": hybrid}


def measure(seeds: int) -> list[dict]:
    """Ratios to LoRA of the same seed, their mean over seeds."""
    rows = []
    for rank in (1, SIZE):
        for noise in (0.0, 4.0):
            sizes: dict[str, list] = {
                name: [update_sizes(config, gradient(rank, seed), noise, seed) for seed in range(seeds)]
                for name, config in configs().items()
            }
            loras = sizes["LoRA"]
            for name, config in configs().items():
                hybrid_r, k = getattr(config, "hybrid_r", 0), getattr(config, "gralora_k", 1)
                k = k if getattr(config, "use_gralora", False) else 1
                for step in STEPS:
                    pairs = [(own[step], lora[step]) for own, lora in zip(sizes[name], loras, strict=True)]
                    rms, along = (statistics.mean(own[i] / lora[i] for own, lora in pairs) for i in (0, 1))
                    rows.append(
                        {"method": name, "gradient_rank": rank, "noise": noise, "steps": step, "seeds": seeds}
                        | {"met_over_r": (hybrid_r + (R - hybrid_r) / k) / R}
                        | {"rms": statistics.mean(own[step][0] for own in sizes[name])}
                        | {"rms_over_lora": rms, "along_gradient_over_lora": along}
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    rows = measure(args.seeds)
    for row in rows:
        print(
            f"rank {row['gradient_rank']:3d}  noise {row['noise']:.0f}  {row['method']:26s} after {row['steps']:4d}: "
            f"rms {row['rms']:.2e}, to LoRA's {row['rms_over_lora']:.3f}, "
            f"along G {row['along_gradient_over_lora']:.3f}"
            f"  (m/r {row['met_over_r']:.3f}, root {row['met_over_r'] ** 0.5:.3f})"
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
