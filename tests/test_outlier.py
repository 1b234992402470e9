"""The mechanism that GraLoRA is made for, on data whose answer is known: an outlier stays in its chunk's blocks."""

import pytest
import torch
from benchmarks import outlier
from helpers import CASES, case_config, factors_of, one_layer, only_layer, randomize
from peft import get_peft_model


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("B_std", [0.0, 0.3], ids=["start", "later"])
def test_outlier_reaches_k_of_the_blocks(k: int, B_std: float) -> None:
    """In GraLoRA's update, as in full fine-tuning's, the other blocks stay as they are to the last bit's rounding."""
    size, channel = 32, 13
    G, G0 = outlier.synthetic_gradient(size, 64, channel, factor=30.0)
    chunk = channel // (size // k)
    for blocks, reached in ((k, k), (1, k * k)):
        A, B = outlier.factors(blocks, 8, size, size, seed=1, B_std=B_std)
        deviation = outlier.deviation(outlier.update(G, A, B), outlier.update(G0, A, B), k)
        assert int((deviation > 1e-12).sum()) == reached
        assert (deviation[:, chunk] > 0.5).all()
    full = outlier.deviation(G, G0, k)
    assert int((full > 0).sum()) == k


def test_deviation_of_lora_grows_with_the_outlier() -> None:
    """In proportion to the factor less one; GraLoRA's other blocks stay at zero."""
    others = []
    for factor in (11.0, 101.0):
        maps = outlier.compare(*outlier.synthetic_gradient(64, 64, 5, factor), k=4, r=16, seeds=2)
        rows = outlier.summarise(maps, chunk=0)
        assert rows["GraLoRA"]["other_blocks"] < 1e-12 and rows["LoRA"]["blocks_over_0.1"] == 16
        others.append(rows["LoRA"]["other_blocks"])
    assert others[1] == pytest.approx(10 * others[0], rel=1e-6)


def test_update_is_what_a_step_does_to_the_adapter() -> None:
    """U is the derivative of dW along a gradient step of the adapter's own parameters."""
    case = CASES[4]
    model = randomize(get_peft_model(one_layer(case), case_config(case, lora_alpha=case.r)))
    layer = only_layer(model)
    G = torch.randn(
        case.out_features, case.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    A, B, *_ = factors_of(layer)
    before = layer.get_delta_weight("default").detach()
    gradients = torch.autograd.grad((layer.get_delta_weight("default") * G).sum(), (A, B))
    expected = outlier.update(G, A.detach(), B.detach())
    step = 1e-7
    with torch.no_grad():
        for p, gradient in zip((A, B), gradients, strict=True):
            p.add_(gradient, alpha=step)
    torch.testing.assert_close((layer.get_delta_weight("default") - before) / step, expected, rtol=1e-4, atol=1e-4)
