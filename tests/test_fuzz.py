"""Damaged and hostile adapter files: each is refused with a clear message or read right, and nothing is changed.

Every input is a good adapter, changed one to three times: in its config, its tensors, or the bytes of its files. Each
goes through load_adapter, inspect_adapter, convert_adapter and merge_adapter. What loads must give the output that
the file's tensors and numbers define, computed here from the formulas.
"""

import json
import math
import random
import re
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import SEED, Factors, gralora_config, naive_delta, random_input, randomize, times
from safetensors.torch import load_file, save
from saved import CONFIG, WEIGHTS
from torch import Tensor, nn

import gralora

QUICK, SLOW = 300, 10_000
MEMORY = 1 << 30  # bytes that one input may make the process grow by
TIME_S = 20  # that one input may take
PREFIX = "base_model.model."


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


@contextmanager
def limits() -> Iterator[None]:
    """No more memory than MEMORY on top of now, and an exception after TIME_S."""

    def too_long(*_: Any) -> None:
        raise TimeoutError("the input took too long")

    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    signal.alarm(TIME_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


# The good adapters


def seeds(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Config and tensors of one adapter of each format, and of one that also replaces a module."""
    found = {}
    fields = {"k": 2, "r": 6, "hybrid_r": 2, "target_modules": ["first", "second"]}
    for name, more in {"gralora": {}, "modules_to_save": {"modules_to_save": ["head"]}}.items():
        model = randomize(peft.get_peft_model(TwoLayers(), gralora_config(**fields | more)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder / name)
        found[name] = json.loads((folder / name / CONFIG).read_text()), load_file(folder / name / WEIGHTS)
    gralora.convert_adapter(folder / "gralora", folder / "peft", to="peft")
    config, tensors = json.loads((folder / "peft" / CONFIG).read_text()), load_file(folder / "peft" / WEIGHTS)
    found["peft"] = config, tensors
    original = {name: value for name, value in config.items() if name not in ("alpha", "r")}
    found["squeezebits"] = original | {"gralora_alpha": config["alpha"], "r": 6}, tensors
    fork = {"peft_type": "LORA", "use_gralora": True, "r": 6, "lora_alpha": 12, "gralora_k": 2, "hybrid_r": 2}
    found["fork"] = fork | {"target_modules": ["first", "second"]}, tensors
    return found


# Mutations

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    4,
    8,
    2**31,
    2**61 - 1,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "8",
]
ODD += ["../../../../etc/passwd", "/etc", "\0", "é" * 10, [], [[]], [None], [1], ["first"], ["(", "["], {}, {"a": 1}]
ODD += [{"first": 3}, {"first": 2**40}, {"first": None}, {"first": "8"}, {"(": 4}, {"first": math.nan}, [{"a": [{}]}]]
ODD += ["(", "first", ".*", "(.*)*x", r"((\w+)+\.)*$", "all-linear", "LORA", "GRALORA", ["first", "first"], ["head"]]
ODD += [{"base_model_class": "Popen", "parent_library": "subprocess"}, "auto", "gaussian", "pissa", 2.0, [[0, 1]]]
NAMES = ["r", "lora_alpha", "alpha", "gralora_alpha", "gralora_k", "hybrid_r", "use_rslora", "rank_pattern", "bias"]
NAMES += ["alpha_pattern", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "peft_type"]
NAMES += ["layers_pattern", "base_model_name_or_path", "auto_mapping", "gralora_format", "use_gralora", "lora_bias"]
NAMES += ["trainable_token_indices", "layer_replication", "runtime_config", "self", "cls", "kwargs", "megatron_core"]
NAMES += [
    "gralora_k_pattern",
    "gralora_scaling",
    "use_dora",
    "lora_dropout",
    "gralora_dropout",
    "task_type",
    "init_lora_weights",
    "fan_in_fan_out",
    "peft_version",
    "",
]


def set_field(r: random.Random, config: dict, tensors: dict) -> None:
    name = r.choice(NAMES) if r.random() < 0.6 else r.choice(sorted(config))
    config[name] = r.choice(ODD)


def drop_field(r: random.Random, config: dict, tensors: dict) -> None:
    del config[r.choice(sorted(config))]


def rename_field(r: random.Random, config: dict, tensors: dict) -> None:
    config[r.choice(NAMES)] = config.pop(r.choice(sorted(config)))


def nest_field(r: random.Random, config: dict, tensors: dict) -> None:
    value: Any = 1
    for _ in range(r.choice([1, 50, 500])):
        value = [value] if r.random() < 0.5 else {"a": value}
    config[r.choice(NAMES)] = value


def drop_tensor(r: random.Random, config: dict, tensors: dict) -> None:
    if tensors:
        del tensors[r.choice(sorted(tensors))]


def drop_layer(r: random.Random, config: dict, tensors: dict) -> None:
    layer = r.choice(["first", "second", "head"])
    for name in [name for name in tensors if f".{layer}." in name]:
        del tensors[name]


def rename_tensor(r: random.Random, config: dict, tensors: dict) -> None:
    if tensors:
        name = r.choice(sorted(tensors))
        changes = [("first", "third"), ("first", "second"), ("lora_A", "lora_B"), (PREFIX, ""), (PREFIX, PREFIX * 2)]
        changes += [(name, ""), (name, "../../x"), (name, "a" * 5000), ("weight", ""), ("hybrid_", ""), ("A", "B")]
        old, new = r.choice(changes)
        tensors[name.replace(old, new)] = tensors.pop(name)


def copy_tensor(r: random.Random, config: dict, tensors: dict) -> None:
    if tensors:
        name = r.choice(sorted(tensors))
        copies = [name.removeprefix(PREFIX), name.replace(".weight", ".bias"), f"{PREFIX}extra.weight", "../../x", ""]
        copies += [name.replace("gralora_A", "lora_A.weight").replace("gralora_B", "lora_B.weight"), "__metadata__x"]
        tensors[r.choice(copies)] = tensors[name].clone()


def reshape_tensor(r: random.Random, config: dict, tensors: dict) -> None:
    if tensors:
        name = r.choice(sorted(tensors))
        t = tensors[name]
        changes = [t.reshape(-1), t.unsqueeze(0), t.mT if t.ndim > 1 else t, t[:0], t[..., :0], t[:1], t[..., :1]]
        changes += [torch.cat([t, t]), torch.cat([t, t], -1), torch.tensor(1.0), t.flip(0), torch.ones(3, 5, 7)]
        changes += [t.reshape(t.shape[::-1]), torch.ones(1, 1, 1), t.unflatten(-1, (-1, 1))]
        tensors[name] = r.choice(changes).contiguous()


def retype_tensors(r: random.Random, config: dict, tensors: dict) -> None:
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
    dtype = r.choice(dtypes)
    for name in r.sample(sorted(tensors), r.choice([1, len(tensors)])) if tensors else []:
        tensors[name] = tensors[name].to(dtype)


def spoil_tensor(r: random.Random, config: dict, tensors: dict) -> None:
    floats = [name for name, t in tensors.items() if t.dtype.is_floating_point and t.numel() and t.element_size() > 1]
    for name in r.sample(floats, min(len(floats), r.choice([1, 1, 1, 100]))):
        value = r.choice([math.nan, math.inf, -math.inf, 0.0, 1e38, 1e-45, -1e300])
        t = tensors[name] = tensors[name].clone()
        value = torch.tensor(value, dtype=torch.float64).to(t.dtype)
        if r.random() < 0.5:
            t.view(-1)[r.randrange(t.numel())] = value
        else:
            t.fill_(value)


def other_k(r: random.Random, config: dict, tensors: dict) -> None:
    """Consistent tensors of another k, which the config may or may not know."""
    k = r.choice([1, 2, 4])
    for name, t in tensors.items():
        if t.ndim == 3 and t.numel() % k == 0 and re.search(r"lora_[AB]", name):
            size = t.shape[2] if "_A" in name else t.shape[1]
            if size and t.numel() % (k * size) == 0:
                tensors[name] = (t.reshape(k, -1, size) if "_A" in name else t.reshape(k, size, -1)).contiguous()
    if r.random() < 0.5:
        config["gralora_k"] = k


def many_tensors(r: random.Random, config: dict, tensors: dict) -> None:
    for i in range(r.choice([10, 300])):
        tensors[f"{PREFIX}layer{i}.lora_A.weight"] = torch.ones(1)


PARTS = [set_field, set_field, set_field, drop_field, rename_field, nest_field, drop_tensor, drop_layer]
PARTS += [rename_tensor, copy_tensor, reshape_tensor, retype_tensors, spoil_tensor, other_k, many_tensors]


def mutate_text(r: random.Random, text: bytes) -> bytes:
    at = r.randrange(len(text) + 1)
    changes: list[Callable[[], bytes]] = [
        lambda: text[:at],
        lambda: b"",
        lambda: text[:at] + bytes([r.randrange(256)]) + text[at + 1 :],
        lambda: text[:at] + r.randbytes(r.choice([1, 8, 100])) + text[at:],
        lambda: b"[" * r.choice([10, 100_000]) + text,
        lambda: text.rstrip()[:-1] + b', "r": ' + b'{"a":' * 100_000 + b"}" * 100_000 + b"}",
        lambda: text.rstrip()[:-1] + b', "r": ' + b"9" * r.choice([30, 6000]) + b"}",
        lambda: text.rstrip()[:-1] + b', "lora_alpha": 1, "r": 6, "hybrid_r": 2}',
        lambda: b"\xef\xbb\xbf" + text,
        lambda: text.decode("utf-8", "replace").encode("utf-16"),
        lambda: b"[" + text + b"]",
        lambda: r.choice([b"null", b"3", b'"text"', b"[]", b"{}", b"NaN"]),
        lambda: text + text,
    ]
    return r.choice(changes)()


def mutate_header(r: random.Random, blob: bytes) -> bytes:
    size = int.from_bytes(blob[:8], "little")
    header, body = json.loads(blob[8 : 8 + size]), blob[8 + size :]
    names = sorted(name for name in header if name != "__metadata__")
    if not names:
        return blob
    entry = header[r.choice(names)]
    numbers = [0, -1, 1, 3, 2**20, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, 1.5, "8", None, [], True]
    text = None
    match r.randrange(8):
        case 0:
            entry["shape"] = r.choice([[], None, "8", [r.choice(numbers)], [r.choice(numbers) for _ in range(9)]])
        case 1:
            entry["shape"] = [r.choice(numbers) if r.random() < 0.5 else n for n in entry["shape"]]
        case 2:
            entry["data_offsets"] = [r.choice(numbers), r.choice(numbers)]
        case 3:
            entry["data_offsets"] = header[r.choice(names)]["data_offsets"]
        case 4:
            types = ["F32", "F64", "BF16", "F16", "I8", "U64", "C64", "F4", "F8_E8M0", "F8_E4M3", "", "x", None, 3, []]
            entry["dtype"] = r.choice(types)
        case 5:
            header["__metadata__"] = r.choice([None, [], "x", {"format": "pt", "a": 1}, {"format": "tf"}, {}, 3])
        case 6:
            key = r.choice(["dtype", "shape", "data_offsets"])
            del entry[key]
        case 7:  # the same name twice in the JSON text
            again = json.dumps({r.choice(names): entry})
            text = json.dumps(header)[:-1] + ", " + again[1:]
    head = (text or json.dumps(header)).encode()
    return len(head).to_bytes(8, "little") + head + body


def mutate_blob(r: random.Random, blob: bytes) -> bytes:
    at = r.randrange(len(blob) + 1)
    sizes = [0, 1, 7, 8, len(blob), 2**20, 2**31, 2**40, 2**63, 2**64 - 1]
    changes: list[Callable[[], bytes]] = [
        lambda: mutate_header(r, blob),
        lambda: mutate_header(r, blob),
        lambda: mutate_header(r, blob),
        lambda: mutate_header(r, blob),
        lambda: blob[:at],
        lambda: b"",
        lambda: blob[: r.randrange(17)],
        lambda: blob[:at] + bytes([r.randrange(256)]) + blob[at + 1 :],
        lambda: blob[:at] + r.randbytes(r.choice([1, 8, 100])) + blob[at:],
        lambda: blob + r.randbytes(r.choice([1, 1000])),
        lambda: r.choice(sizes).to_bytes(8, "little") + blob[8:],
        lambda: r.randbytes(200),
        lambda: b"\x80\x04" + blob,  # as a pickle starts
    ]
    return r.choice(changes)()


def write_mutant(r: random.Random, folder: Path, seed: tuple[dict, dict]) -> list[str]:
    """Write a changed adapter; returns what was done to it."""
    config, tensors, done = json.loads(json.dumps(seed[0])), dict(seed[1]), []
    raw = r.random()
    for change in r.choices(PARTS, k=0 if raw < 0.3 else r.choice([1, 1, 1, 2, 3])):
        before = json.dumps(config)
        change(r, config, tensors)
        done.append(f"{change.__name__}: {before != json.dumps(config) and json.dumps(config)[:2000]}")
    text, blob = json.dumps(config, indent=2).encode(), save(tensors, {"format": "pt"})
    if raw < 0.15 or 0.9 < raw < 0.95:
        text = mutate_text(r, text)
        done.append("mutate_text")
    elif raw < 0.3 or raw > 0.95:
        blob = mutate_blob(r, blob)
        done.append("mutate_blob")
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(text)
    (folder / WEIGHTS).write_bytes(blob)
    return done


# What a file means

SUFFIXES = [  # gralora's names, and those of the three other programs
    (".lora_A.weight", ".lora_B.weight", ".lora_A.hybrid_weight", ".lora_B.hybrid_weight"),
    (".gralora_A", ".gralora_B", ".gralora_A_general.weight", ".gralora_B_general.weight"),
]


def updates(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By the formulas, from the files alone: dW of each layer, and the tensors that replace the base's."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    is_tuner = config["peft_type"] == "GRALORA"
    suffixes = SUFFIXES[is_tuner or config.get("gralora_format") is None]
    r = config["r"] + (config["hybrid_r"] if "alpha" in config and is_tuner else 0)
    alpha = config.get("gralora_alpha", config.get("alpha")) if is_tuner else config["lora_alpha"]
    found, rest = {}, {name.removeprefix(PREFIX): t for name, t in tensors.items()}
    for layer in ("first", "second", "head"):
        names = [f"{layer}{suffix}" for suffix in suffixes]
        if names[0] in rest:
            rank = (config.get("rank_pattern") or {}).get(layer, r)
            scale = (config.get("alpha_pattern") or {}).get(layer, alpha)
            scale = scale / (math.sqrt(rank) if config.get("use_rslora") else rank)
            factors = Factors(*(rest.pop(name).double() if name in rest else None for name in names))
            found[layer] = scale * naive_delta(factors)
    return found, rest


def merged_model(folder: Path) -> nn.Module:
    """The base in float64 with the adapter's updates in its weights."""
    model, (dWs, replaced) = TwoLayers().double(), updates(folder)
    with torch.no_grad():
        for layer, dW in dWs.items():
            model.get_submodule(layer).weight.add_(dW)
        for name in ("head.weight", "head.bias"):
            if name in replaced:
                model.get_parameter(name).copy_(replaced[name])
    return model


HUGE = 1e30  # near it, float32 may overflow on the way
X = random_input(5, 8)


def assert_means(actual: nn.Module, folder: Path) -> None:
    with torch.no_grad():
        expected, out = merged_model(folder)(X), actual.double()(X)
    if expected.abs().max() < HUGE:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# The readers


def snapshot(model: nn.Module) -> Any:
    modules = [(name, id(module), type(module), module.training) for name, module in model.named_modules()]
    weights = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return modules, weights, sorted(vars(model))


def assert_same(model: nn.Module, before: Any) -> None:
    modules, weights, names = snapshot(model)
    assert (modules, names) == (before[0], before[2])
    for now, then in zip(weights, before[1], strict=True):
        assert now[:3] == then[:3] and torch.equal(now[3], then[3]), now[0]


def assert_clear(error: Exception) -> None:
    assert type(error) in (ValueError, FileNotFoundError), f"{type(error)}: {error}"
    assert len(str(error)) > 20, error


def try_load(folder: Path) -> bool:
    model = TwoLayers()
    before = snapshot(model)
    try:
        loaded = gralora.load_adapter(model, folder)
    except (ValueError, OSError) as error:
        assert_clear(error)
        assert_same(model, before)
        return False
    assert_means(loaded, folder)
    return True


def try_inspect(folder: Path) -> bool:
    try:
        description = gralora.inspect_adapter(folder)
    except (ValueError, OSError) as error:
        assert_clear(error)
        return False
    json.dumps(description)
    if not description["anomalies"]:
        dWs, _ = updates(folder)
        for layer in set(dWs) & set(description["layers"]):
            assert description["layers"][layer]["norm"] == pytest.approx(dWs[layer].norm().item(), rel=1e-4)
    return True


def try_convert(folder: Path, out: Path) -> bool:
    try:
        gralora.convert_adapter(folder, out)
    except (ValueError, OSError) as error:
        assert_clear(error)
        assert not out.exists() and not list(out.parent.glob(f".{out.name}.*"))
        return False
    tensors = load_file(out / WEIGHTS)
    expected = {bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in load_file(folder / WEIGHTS).values()}
    assert {bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in tensors.values()} <= expected
    shutil.rmtree(out)
    return True


def try_merge(folder: Path, out: Path, base: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gralora.merge_adapter(folder, out, base)
    except (ValueError, OSError) as error:
        assert_clear(error)
        assert not out.exists() and not list(out.parent.glob(f".{out.name}.*"))
        return False
    merged = TwoLayers()
    merged.load_state_dict(load_file(out / "model.safetensors"))
    assert_means(merged, folder)
    shutil.rmtree(out)
    return True


def run(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Try `count` mutants; returns how often each reader accepted one."""
    warnings.simplefilter("ignore")
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(save(TwoLayers().state_dict()))
    good = seeds(folder)
    accepted = dict.fromkeys(("load", "inspect", "convert", "merge"), 0)
    for i in range(count):
        r = random.Random(f"{seed} {i}")
        name = r.choice(sorted(good))
        done = write_mutant(r, folder / "mutant", good[name])
        try:
            with limits():
                accepted["load"] += try_load(folder / "mutant")
                accepted["inspect"] += try_inspect(folder / "mutant")
                accepted["convert"] += try_convert(folder / "mutant", folder / "out")
                accepted["merge"] += try_merge(folder / "mutant", folder / "out", base)
        except BaseException as error:
            error.add_note(f"input {i} of seed {seed}: {name}, {done}")
            raise
    return accepted


def test_good_adapters_are_accepted(tmp_path: Path) -> None:
    """The oracle agrees with every reader where nothing is damaged."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(save(TwoLayers().state_dict()))
    for name, (config, tensors) in seeds(tmp_path).items():
        folder = tmp_path / f"{name} again"
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(config))
        (folder / WEIGHTS).write_bytes(save(tensors))
        with limits():
            assert try_load(folder) and try_inspect(folder) and try_convert(folder, tmp_path / "out")
            assert try_merge(folder, tmp_path / "out", tmp_path / "base")


def test_mutated_adapters(tmp_path: Path) -> None:
    accepted = run(tmp_path, QUICK, seed=0)
    assert all(0 < n < QUICK for n in accepted.values()), accepted


@pytest.mark.slow
def test_many_mutated_adapters(tmp_path: Path) -> None:
    count = 50 * times(SLOW // 50)
    accepted = run(tmp_path, count, seed=1 + SEED)
    print(f"{count} mutated adapters, accepted by: {accepted}")
    assert all(0 < n < count for n in accepted.values()), accepted
