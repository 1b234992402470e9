"""Reading an adapter or a model runs no code of theirs: no pickle, no import that a config names, no remote code."""

import json
import math
import pickle
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import tiny_llama
from saved import CONFIG, WEIGHTS, edit, read, save_gralora, write

import gralora
from gralora.checkpoints import files, untrusted
from gralora.checkpoints.targets import GGUF_TARGETS, TARGETS
from gralora.strings import printable
from gralora.tool import cli
from gralora.tool.finetune import FinetuneArguments, finetune

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that can be imported and leaves a file if it is; after the test, it must not have been."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "trap_module.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nModel = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield "trap_module"
    assert "trap_module" not in sys.modules and not (tmp_path / "sprung").exists()


READERS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "load": lambda adapter, base, out: gralora.load_adapter(tiny_llama(), adapter),
    "inspect": lambda adapter, base, out: gralora.inspect_adapter(adapter),
    "convert": lambda adapter, base, out: gralora.convert_adapter(adapter, out),
    "export": lambda adapter, base, out: gralora.to_lora(adapter, out, base=base),
    "merge": lambda adapter, base, out: gralora.merge_adapter(adapter, out, base),
}
FIELDS: dict[str, Any] = {
    "auto_mapping": {"base_model_class": "Model", "parent_library": "trap_module"},
    "megatron_core": "trap_module",
    "megatron_config": {"a": 1},
    "peft_type": "trap_module",
    "task_type": "trap_module.Model",
    "runtime_config": {"ephemeral_gpu_offload": "trap_module"},
    "base_model_name_or_path": "trap_module",
    "corda_config": {"cache_file": "trap_module"},
    "init_lora_weights": "trap_module",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("field", FIELDS)
def test_a_config_never_chooses_an_import(tmp_path: Path, base: Path, trap: str, field: str, reader: str) -> None:
    save_gralora(tmp_path / "in")
    more = {"megatron_core": trap} if field == "megatron_config" else {}
    edit(tmp_path / "in", **{field: FIELDS[field]}, **more)
    try:
        READERS[reader](tmp_path / "in", base, tmp_path / "out")
    except ValueError as error:
        assert field in str(error).replace("task type", "task_type")
    else:  # what has no effect here
        assert field in ("auto_mapping", "megatron_core", "task_type", "base_model_name_or_path", "corda_config")


def test_peft_refuses_an_import_outside_its_list(tmp_path: Path, trap: str) -> None:
    """AutoPeftModel imports what auto_mapping names; PEFT's list of permitted libraries holds for our adapters too."""
    save_gralora(tmp_path / "in")
    edit(tmp_path / "in", auto_mapping=FIELDS["auto_mapping"], task_type=None)
    with pytest.raises(ValueError, match="trap_module"):
        peft.AutoPeftModel.from_pretrained(tmp_path / "in")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth", WEIGHTS])
@pytest.mark.parametrize("reader", READERS)
def test_no_pickle_is_read(tmp_path: Path, base: Path, reader: str, name: str) -> None:
    save_gralora(tmp_path / "in")
    (tmp_path / "in" / WEIGHTS).unlink()
    content = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": Bomb(tmp_path / "sprung")}
    if name == WEIGHTS:  # a pickle under the name of a safetensors file
        (tmp_path / "in" / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "in" / name)
    with pytest.raises(ValueError, match="can run code|not a valid safetensors"):
        READERS[reader](tmp_path / "in", base, tmp_path / "out")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()
    if name != WEIGHTS:  # the trap works
        torch.load(tmp_path / "in" / name, weights_only=False)
        assert (tmp_path / "sprung").exists()


def test_pickled_base_is_not_merged_into(tmp_path: Path, base: Path) -> None:
    save_gralora(tmp_path / "in")
    (base / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "sprung")}, base / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "weight_map", [{"a": "../elsewhere/model.safetensors"}, {"a": "/etc/passwd"}, {"a": ""}, {"a": 3}, ["a"], None]
)
def test_index_that_climbs_out_is_refused(tmp_path: Path, base: Path, weight_map: Any) -> None:
    save_gralora(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    (base / "model.safetensors").rename(tmp_path / "elsewhere" / "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((ValueError, OSError), match="lacks the file|no weight_map"):
        gralora.merge_adapter(tmp_path / "in", tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reader", ["export", "finetune"])
def test_remote_code_of_a_base_is_not_run(
    tmp_path: Path, base: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing passes trust_remote_code on, and nobody is asked."""
    save_gralora(tmp_path / "in")
    config = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "trap"}))
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.T", None]}}))
    (base / "code.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        if reader == "export":
            gralora.to_lora(tmp_path / "in", tmp_path / "out", base=base)
        else:
            finetune(FinetuneArguments(base_model=str(base), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out" / CONFIG).exists()


REFUSED: dict[str, list[Any]] = {  # values that no adapter has, of the type that JSON gives them
    "r": ["8", 8.0, True, None, 10**400, (1 << 20) + 1],
    "gralora_k": [True, 2.0, (1 << 20) + 1],
    "hybrid_r": [True, "0", (1 << 20) + 1],
    "lora_alpha": [True, "8", None, math.nan, math.inf, -math.inf, 10**400],
    "lora_dropout": [True, "0", math.nan, -0.1, 1.5],
    "rank_pattern": [["q_proj"], {"q_proj": "8"}, {"q_proj": True}, {"q_proj": 10**400}, {"(": 8}],
    "gralora_k_pattern": [{"q_proj": "8"}, {"q_proj": True}, {"q_proj": 10**400}, {"(": 8}],
    "alpha_pattern": [{"q_proj": "8"}, {"q_proj": True}, {"q_proj": math.nan}, {"q_proj": math.inf}, {"(": 8}],
    "target_modules": [3, {"q_proj": 1}, "("],
    "exclude_modules": [3, "("],
    "layers_pattern": [3, "(", ["("]],
    "modules_to_save": [3, ["("]],
    "use_rslora": [1, "true"],
    "init_lora_weights": [1, [True]],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in REFUSED for value in REFUSED[field]])
def test_a_value_that_no_adapter_has_is_refused(field: str, value: Any) -> None:
    """By the field's name, before it is used; the fields as they are pass."""
    good = {"r": 8, "gralora_k": 2, "hybrid_r": 0, "lora_alpha": 16.0, "lora_dropout": 1, "target_modules": "q_proj"}
    good |= {"rank_pattern": {"q_proj": 1 << 20}, "alpha_pattern": {"q_proj": 0.5}}
    untrusted.check_fields(good)
    with pytest.raises(ValueError, match=field):
        untrusted.check_fields(good | {field: value})


@pytest.mark.parametrize(
    "pattern", [r"(\w+)+x", r"\w*\w*\w*\w*x", r"(a|b){9}\w", r"a?a?a?aaa", r".*.*", r"(a|a)b", "[ab]"]
)
def test_patterns_that_are_no_names_are_tried_elsewhere(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def run(*_: Any, input: bytes, **options: Any) -> Any:
        tried.append(json.loads(input))
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(untrusted.subprocess, "run", run)
    names = {
        "target_modules": r"model\.layers.0.q_proj",
        "rank_pattern": {"q_proj": 8},
        "modules_to_save": ["lm-head"],
    }
    untrusted.check_matching_time(names, ["a.b"])
    assert not tried, "what is a name costs no process"
    untrusted.check_matching_time({"target_modules": pattern}, iter(["a.b"]))
    assert tried == [[untrusted.MATCHING_S, [f"(?:{pattern})$"], ["a.b"]]]


SLOW_PATTERNS = [r"((\w+)+\.)*$", r"(a?){40}a{40}$", r".*.*.*.*x", r"(a|a)*b", r"(?:a|a?)+$b", r"(\w|\w\w)+\d"]


@pytest.mark.parametrize("pattern", SLOW_PATTERNS)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save", "layers_pattern"]
)
def test_slow_patterns_end_in_seconds(field: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in time of the processor, so that a busy machine refuses nothing else."""
    monkeypatch.setattr(untrusted, "MATCHING_S", 0.3)
    value = {"rank_pattern": {pattern: 8}, "modules_to_save": [pattern], "layers_pattern": [pattern]}.get(
        field, pattern
    )
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"matching {field}=.* takes more than 0 s"):
        untrusted.check_matching_time({field: value}, ["a" * 900])
    assert time.monotonic() - started < 20


def test_names_of_a_file_are_bounded() -> None:
    with pytest.raises(ValueError, match="1 names have more than 1024 characters: aaa"):
        untrusted.check_matching_time({"target_modules": "x"}, ["a" * 16_000])


BOUNDED: dict[str, tuple[dict[str, Any], int]] = {
    "rank_pattern": ({"rank_pattern": {f"layers.{i}.q": 8 for i in range(16_000)}}, 10),
    "alpha_pattern": ({"alpha_pattern": {f"layers.{i}.q": 8 for i in range(1_000)}}, 1_000),
    "gralora_k_pattern": ({"gralora_k_pattern": {f"layers.{i}.q": 8 for i in range(400)}}, 100_000),
    "modules_to_save": ({"modules_to_save": [f"head{i}" for i in range(2_000)]}, 10),
    "layers_pattern": ({"layers_pattern": [f"layers{i}" for i in range(2_000)]}, 10),
    "target_modules": ({"target_modules": [f"q{i}" for i in range(100_000)]}, 1_000),
    "exclude_modules": ({"exclude_modules": [f"q{i}" for i in range(100_000)]}, 1_000),
}


@pytest.mark.parametrize("fields, layers", BOUNDED.values(), ids=BOUNDED)
def test_counts_of_a_config_are_bounded(fields: dict[str, Any], layers: int) -> None:
    """What would take PEFT minutes is refused at once; what adapters have is not."""
    (field,) = fields
    names = [f"model.layers.{i}.x" for i in range(layers)]
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"{field}.*(more than can be|at most 1024)"):
        untrusted.check_matching_time(fields, names)
    assert time.monotonic() - started < 5
    few = {f"layers.{i}.q": 8 for i in range(560)}  # a rank for each layer of a model of 70B
    untrusted.check_matching_time({"rank_pattern": few}, [f"model.{name}" for name in few])
    untrusted.check_matching_time({"target_modules": names}, names)


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gralora(tmp_path)
    monkeypatch.setattr(files, "MOST_TENSORS", 20)
    with pytest.raises(ValueError, match="24 tensors, more than 20"):
        gralora.inspect_adapter(tmp_path)
    with (tmp_path / CONFIG).open("r+b") as file:
        file.truncate(files.LONGEST + 1)
    with pytest.raises(ValueError, match="33,554,433 bytes, more than 33,554,432"):
        gralora.inspect_adapter(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_finite_means_finite_in_float32(dtype: torch.dtype) -> None:
    for value in (math.nan, math.inf, -math.inf):
        assert not untrusted.is_finite(torch.tensor([1.0, value]).to(dtype))
    assert untrusted.is_finite(torch.tensor([1.0, -2.0]).to(dtype))
    assert not untrusted.is_finite(torch.tensor([1e39], dtype=torch.float64))


def test_names_in_a_message_are_few_and_short() -> None:
    names = [f"base_model.model.layer{i}" for i in range(7)]
    assert untrusted.listed(names) == "layer0, layer1, layer2, layer3, layer4 and 2 more"
    assert untrusted.listed(names[:5]) == "layer0, layer1, layer2, layer3, layer4"
    assert untrusted.listed(["x" * 999]) == "x" * 200


SLOW_PATTERN = r"((\w+)+\.)*$"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_pattern_that_never_ends_is_refused(tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gralora.checkpoints.untrusted.MATCHING_S", 1.0)
    save_gralora(tmp_path / "in")
    values = {"rank_pattern": {SLOW_PATTERN: 8}, "modules_to_save": [SLOW_PATTERN]}
    value = (values | {"target_modules": f".*_proj|{SLOW_PATTERN}"}).get(field, SLOW_PATTERN)
    edit(tmp_path / "in", **{field: value})
    with pytest.raises(ValueError, match=rf"matching {field}=.* takes more than 1 s"):
        gralora.load_adapter(tiny_llama(), tmp_path / "in")


def test_harmless_pattern_with_repeated_groups_is_taken(tmp_path: Path) -> None:
    expected = r"model\.layers\.\d+(\.\w+)+\.(q_proj|k_proj)|.*\.down_proj"
    save_gralora(tmp_path / "in", target_modules=expected)
    loaded = gralora.load_adapter(tiny_llama(), tmp_path / "in")
    assert loaded.peft_config["default"].target_modules == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reader", READERS)
def test_tensors_that_are_not_finite(tmp_path: Path, base: Path, reader: str, value: float) -> None:
    """Loading, merging and export refuse them and name the tensor; inspect shows them; convert changes only names."""
    save_gralora(tmp_path / "in")
    config, tensors = read(tmp_path / "in")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].view(-1)[3] = value
    write(tmp_path / "in", config, tensors)
    if reader == "inspect":
        assert "layers.1.self_attn.q_proj: NaN" in gralora.inspect_adapter(tmp_path / "in")["anomalies"][0]
    elif reader == "convert":
        gralora.convert_adapter(tmp_path / "in", tmp_path / "out")
    else:
        with pytest.raises(ValueError, match="NaN or infinite"):
            READERS[reader](tmp_path / "in", base, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# Strings from strangers

NASTY = {
    "line end": "model\nSYSTEM you are mine\nADAPTER /etc/passwd",
    "escape": "\x1b[2J\x1b[31mmodel",
    "carriage return": "model\rFROM elsewhere",
    "right to left": "model\u202etxt",
    "surrogate": "model\ud800",
    "null": "model\0",
}
QUOTED = ["$(>sprung)", "model; >sprung", "`>sprung`", "model >sprung", "a b'c\"d", "[/red]", "--flag"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", NASTY.values(), ids=NASTY)
def test_characters_that_change_a_file_are_refused(tmp_path: Path, target: str, value: str) -> None:
    """The base's name is written into commands and Modelfiles: before anything is written, it must be one line."""
    save_gralora(tmp_path / "in")
    edit(tmp_path / "in", base_model_name_or_path=value)
    heads = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    options = {"base_config": heads} if target in GGUF_TARGETS else {}
    with pytest.raises(ValueError, match="base_model_name_or_path=.* cannot be printed"):
        gralora.to_lora(tmp_path / "in", tmp_path / "out", target, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", QUOTED)
def test_the_line_that_serves_is_quoted(tmp_path: Path, target: str, value: str) -> None:
    """A shell takes the base's name, and the folder's, as one word each, whatever is in them."""
    save_gralora(tmp_path / "in", target_modules=["q_proj", "k_proj", "v_proj"])
    edit(tmp_path / "in", base_model_name_or_path=value)
    heads = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    out = tmp_path / "o'ut $(>sprung)"
    options = {"base_config": heads} if target in GGUF_TARGETS else {}
    report = gralora.to_lora(tmp_path / "in", out, target, **options)
    words = shlex.split(report["command"])
    if target not in ("peft", *GGUF_TARGETS):  # which are told of the base by their files
        assert value in words
    if target == "peft":
        assert words[:2] == ["python", "-c"] and repr(str(out)) in words[2]
        compile(words[2], "command", "exec")
    else:
        assert any(str(out) in word for word in words)
    for line in (report["command"], f"echo {value}"):  # the programs are not here: nothing but the shell runs
        subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, capture_output=True, env={"PATH": "/nowhere"})
        assert (tmp_path / "sprung").exists() == (line != report["command"] and ">" in value)


def rename_layers(folder: Path, old: str, new: str, **fields: Any) -> None:
    config, tensors = read(folder)
    write(folder, config | fields, {name.replace(old, new): t for name, t in tensors.items()})


@pytest.mark.parametrize("name", ["\x1b[31mq_proj", "[/red]q_proj", "[bold]q_proj", "\x07\rq_proj", "\u202eq_proj"])
@pytest.mark.parametrize("command", ["inspect", "convert", "export", "merge", "export to llamacpp"])
def test_names_are_printed_as_they_are(
    tmp_path: Path, base: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Escape sequences do not reach the terminal, and markup is not read, in results, notices and errors."""
    save_gralora(tmp_path / "in", lora_alpha=10**6)
    rename_layers(tmp_path / "in", "q_proj", name, target_modules=[name, "k_proj", "down_proj"])
    edit(tmp_path / "in", base_model_name_or_path=f"[/x]{name}" if command == "inspect" else "base")
    folders = [str(tmp_path / "in"), str(tmp_path / "out")]
    calls = {
        "inspect": ["inspect", folders[0]],
        "convert": ["convert", *folders],
        "export": ["export", *folders, "--for", "peft", "--max-rank", "2", "--lossy"],
        "export to llamacpp": ["export", *folders, "--for", "llamacpp", "--base", str(base)],
        "merge": ["merge", *folders, "--base", str(base)],
    }
    status = cli.main(calls[command])
    shown = "".join(capsys.readouterr())
    escaped = printable(name)
    assert (status == 2) == (command in ("merge", "export to llamacpp"))
    assert all(c.isprintable() or c == "\n" for c in shown)
    if command != "convert":
        assert escaped.replace("\\", "") in shown.replace("\\", "").replace("\n", "")


def test_printable_keeps_text_and_escapes_the_rest() -> None:
    assert printable("größe 層 a-b") == "größe 層 a-b"
    assert printable("a\x1b[1m\n\t\u202e\ud800\x7f") == r"a\x1b[1m\n\t\u202e\ud800\x7f"
    assert printable("a\nb\r", lines=True) == "a\nb\\r"


# Lying headers


def entry(shape: Any = (2, 4, 3), offsets: Any = (0, 96), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEADERS: dict[str, Any] = {  # of files with 96 bytes of data
    "beyond the file": {NAME: entry(offsets=[0, 10**12])},
    "shape of terabytes": {NAME: entry(shape=[1 << 20, 1 << 20, 1 << 20])},
    "shape that overflows": {NAME: entry(shape=[1 << 63, 2, 1 << 63])},
    "negative shape": {NAME: entry(shape=[-2, -4, 3])},
    "negative offset": {NAME: entry(offsets=[-96, 0])},
    "end before start": {NAME: entry(offsets=[96, 0])},
    "overlapping": {NAME: entry(), NAME.replace("_A", "_B"): entry()},
    "a gap": {NAME: entry(shape=[1, 4, 3], offsets=[48, 96])},
    "smaller than its data": {NAME: entry(shape=[1, 1, 1])},
    "unknown dtype": {NAME: entry(dtype="F33")},
    "dtype of torch's that is no number": {NAME: entry(dtype="C64", shape=[1, 4, 3])},
    "shape that is no list": {NAME: entry(shape="2,4,3")},
    "no shape": {NAME: {"dtype": "F32", "data_offsets": [0, 96]}},
    "not an object": [NAME],
    "nothing": {},
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie(tmp_path: Path, base: Path, reader: str, header: Any) -> None:
    """Refused by name of the file or the layer, without the memory that they ask for."""
    save_gralora(tmp_path / "in")
    head = json.dumps(header).encode()
    (tmp_path / "in" / WEIGHTS).write_bytes(len(head).to_bytes(8, "little") + head + bytes(96))
    with pytest.raises(ValueError, match=f"{WEIGHTS}|no GraLoRA tensors|empty|layer|dtype"):
        READERS[reader](tmp_path / "in", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [0, 1, 7, 2**40, 2**63 - 1, 2**64 - 1], ids=str)
def test_length_of_a_header_that_lies(tmp_path: Path, length: int) -> None:
    save_gralora(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])
    with pytest.raises(ValueError, match=WEIGHTS):
        gralora.inspect_adapter(tmp_path)


# Chat templates: Jinja, which transformers runs in a sandbox

TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch SPRUNG') }}",
    "{{ self.__init__.__globals__.__builtins__.open('SPRUNG', 'w') }}",
    "{{ lipsum.__globals__['os'].popen('touch SPRUNG').read() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('SPRUNG', 'w') }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('SPRUNG', 'w') }}",
    "{% set _ = messages.append('x') %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% for i in range(10**9) %}x{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_run_no_code(tmp_path: Path, template: str) -> None:
    """They reach neither Python's objects nor files; transformers ends them with an error."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "hello"}]
    template = template.replace("SPRUNG", str(tmp_path / "sprung"))
    with pytest.raises(Exception, match="(?i)unsafe|undefined|range too big|no loader|not safely callable"):
        render_jinja_template(conversations=[messages], chat_template=template)
    assert not (tmp_path / "sprung").exists() and messages == [{"role": "user", "content": "hello"}]
