"""What an outlier in one input channel does to the update that LoRA and GraLoRA make of a gradient, block by block.

    python -m benchmarks.outlier --model MODEL --out benchmarks/results/outlier.json --figure docs/outlier.svg

A gradient step on the factors changes dW by U, a linear function of G, the gradient of full fine-tuning:
U = G A^T A + B B^T G for LoRA (scaling 1), and the same within every block for GraLoRA. An outlier in channel c makes
column c of G large and nothing else. LoRA's A^T A spreads this column over all columns of U; in GraLoRA it reaches
only the k blocks whose input chunk holds c (arXiv 2505.20355, section 3).

Measured on each block is the deviation: how much U changes when the outlier is there, ||U - U0|| / ||U0||, with U0
that of the same inputs without it, and the same output gradients. Full fine-tuning's is zero outside the k blocks.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.pictures import pyplot, save
from gralora import ops

METHODS = ("full fine-tuning", "LoRA", "GraLoRA")
Factors = tuple[Tensor, Tensor]


def factors(k: int, r: int, in_features: int, out_features: int, seed: int, B_std: float = 0.0) -> Factors:
    """A `[k, I/k, r]` as Kaiming initialises it, and B `[k, r, O/k]`, zero as at the start of training or random."""
    generator = torch.Generator().manual_seed(seed)
    bound = (k / in_features) ** 0.5
    A = torch.rand(k, in_features // k, r, generator=generator, dtype=torch.float64) * 2 * bound - bound
    return A, torch.randn(k, r, out_features // k, generator=generator, dtype=torch.float64) * B_std


def update(G: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """U, the change of dW by a gradient step of size one on A and B, `[O, I]`; its sign is that of +G."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    gA, gB = torch.autograd.grad((ops.delta_weight(A, B, 1.0) * G).sum(), (A, B))
    with torch.no_grad():  # dW is bilinear in the factors
        return ops.delta_weight(A, gB, 1.0) + ops.delta_weight(gA, B, 1.0)


def deviation(with_outlier: Tensor, without: Tensor, k: int) -> Tensor:
    """||U - U0|| / ||U0|| of each of k x k blocks, `[k, k]`, output chunks first."""

    def norms(U: Tensor) -> Tensor:
        return U.unflatten(0, (k, -1)).unflatten(2, (k, -1)).norm(dim=(1, 3))

    return norms(with_outlier - without) / norms(without)


def compare(G: Tensor, G0: Tensor, k: int, r: int, seeds: int) -> dict[str, Tensor]:
    """Deviation by method, `[k, k]`, mean over the seeds of A."""
    out_features, in_features = G.shape
    found = {"full fine-tuning": deviation(G, G0, k)}
    for name, blocks in (("LoRA", 1), ("GraLoRA", k)):
        maps = []
        for seed in range(seeds):
            A, B = factors(blocks, r, in_features, out_features, seed)
            maps.append(deviation(update(G, A, B), update(G0, A, B), k))
        found[name] = torch.stack(maps).mean(dim=0)
    return found


def summarise(maps: dict[str, Tensor], chunk: int) -> dict[str, dict[str, float]]:
    """Mean deviation of the k blocks of the outlier's chunk, and of the others."""
    rows = {}
    for name, m in maps.items():
        others = torch.cat([m[:, :chunk], m[:, chunk + 1 :]], dim=1)
        rows[name] = {
            "outlier_blocks": m[:, chunk].mean().item(),
            "other_blocks": others.mean().item(),
            "blocks_over_0.1": int((m > 0.1).sum()),
        }
    return rows


def synthetic_gradient(size: int, tokens: int, channel: int, factor: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """G with one input channel multiplied by `factor`, and without, from Gaussian inputs and output gradients."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(tokens, size, generator=generator, dtype=torch.float64) for _ in range(2))
    outlier = x.clone()
    outlier[:, channel] *= factor
    return dy.T @ outlier, dy.T @ x


def synthetic(k: int, r: int, seeds: int) -> dict:
    size, channel, rows = 256, 70, []
    chunk = channel // (size // k)
    for factor in (1, 3, 10, 30, 100):
        maps = compare(*synthetic_gradient(size, 512, channel, factor), k, r, seeds)
        rows.append({"factor": factor, "methods": summarise(maps, chunk)})
        if factor == 30:
            shown = {name: m.tolist() for name, m in maps.items()}
    facts = {"size": size, "tokens": 512, "channel": channel, "k": k, "r": r, "seeds": seeds}
    return facts | {"by_factor": rows, "maps_at_30": shown}


def real(folder: Path, k: int, r: int, seeds: int) -> dict:
    """The layer of the model whose input has the strongest outlier channel, on Python source, and what it does."""
    from quality_data import default_folders
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (default_folders()[0] / "argparse.py").read_text()[:8000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :256]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if name.endswith("_proj")}
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[name] = args[0].detach()[0]
            out.register_hook(lambda gradient: gradients.__setitem__(name, gradient[0]))

        module.register_forward_hook(hook)

    for name, module in layers.items():
        watch(name, module)
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()

    def strength(name: str) -> float:
        rms = inputs[name].square().mean(dim=0).sqrt()
        return (rms.max() / rms.median()).item()

    ranked = sorted(layers, key=strength, reverse=True)
    rows = []
    for name in ranked[:1] + [n for n in ranked if n.endswith("down_proj") and n != ranked[0]][:2]:
        x, dy = inputs[name].double(), gradients[name].double()
        rms = x.square().mean(dim=0).sqrt()
        channel = int(rms.argmax())
        ordinary = x.clone()
        ordinary[:, channel] *= rms.median() / rms[channel]
        maps = compare(dy.T @ x, dy.T @ ordinary, k, r, seeds)
        chunk = channel // (x.shape[1] // k)
        facts = {"layer": name, "channel": channel, "rms_over_median": strength(name), "chunk": chunk}
        rows.append(facts | {"methods": summarise(maps, chunk), "maps": {n: m.tolist() for n, m in maps.items()}})
    strengths = [strength(name) for name in layers]
    facts = {"model": folder.name, "tokens": ids.shape[1], "k": k, "r": r, "seeds": seeds}
    return facts | {"median_strength_of_layers": statistics.median(strengths), "layers": rows}


def draw(results: dict, path: Path) -> None:
    """Blocks of LoRA and GraLoRA, synthetic and real, one colour scale a row, and the deviation by the factor."""
    plt = pyplot()

    rows = [("synthetic\none channel x30", results["synthetic"]["maps_at_30"])]
    if "real" in results:
        first = results["real"]["layers"][0]
        layer = first["layer"].removeprefix("model.")
        rows.append((f"{layer}\nchannel {first['channel']}, {first['rms_over_median']:.0f}x", first["maps"]))
    figure, axes = plt.subplots(len(rows), 4, figsize=(12, 3.1 * len(rows)), squeeze=False, layout="constrained")
    for axis_row, (title, maps) in zip(axes, rows, strict=True):
        top = max(max(map(max, maps[name])) for name in ("LoRA", "GraLoRA"))
        for axis, name in zip(axis_row, METHODS, strict=False):
            axis.imshow(maps[name], vmin=0, vmax=top, cmap="Reds")
            for j, row in enumerate(maps[name]):
                for i, value in enumerate(row):
                    shade = "white" if value > 0.6 * top else "black"
                    axis.text(i, j, f"{value:.2g}", ha="center", va="center", fontsize=8, color=shade)
            axis.set(title=name, xlabel="input chunk", ylabel="output chunk", xticks=[], yticks=[])
        axis_row[0].set_ylabel(f"{title}\noutput chunk")
    axis = axes[0][3]
    points = results["synthetic"]["by_factor"]
    for name, style in zip(METHODS, ("--", "-", "-"), strict=True):
        line = [row["methods"][name]["other_blocks"] for row in points]
        axis.plot([row["factor"] for row in points], line, style, marker="o", ms=3, label=name)
    axis.set(xscale="log", title="blocks without the outlier", xlabel="factor on the channel", ylabel="deviation")
    axis.legend(fontsize=8, frameon=False)
    for axis_row in axes[1:]:
        axis_row[3].axis("off")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a causal LM; without it, synthetic data only")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=8, help="of A")
    parser.add_argument("--out", type=Path, help="write the figures' numbers as JSON")
    parser.add_argument("--figure", type=Path, help=".svg to draw")
    args = parser.parse_args()
    results = {"synthetic": synthetic(args.k, args.r, args.seeds)}
    if args.model:
        results["real"] = real(args.model, args.k, args.r, args.seeds)
    for row in results["synthetic"]["by_factor"]:
        print(f"synthetic x{row['factor']}: {row['methods']}")
    for row in results.get("real", {}).get("layers", []):
        print(f"{row['layer']}, channel {row['channel']}, {row['rms_over_median']:.1f} x median: {row['methods']}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.figure:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
