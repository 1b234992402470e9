"""What programs are told of the template and the ends that an adapter was trained with."""

import json
import shlex
from pathlib import Path

import pytest
from helpers import adapted, gralora_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import gralora
from gralora.checkpoints import prompting

TEMPLATE = "{% for m in messages %}{{ m.content }}<stop>{% endfor %}"


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose tokenizer has more tokens than the base, a template, and two ends of its own."""
    folder = tmp_path_factory.mktemp("asked") / "an adapter"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted(model, gralora_config(target_modules=["q_proj"])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 40, 50]).save_pretrained(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {name for name in prompting.FILES if (folder / name).is_file()}


def export(adapter: Path, out: Path, target: str) -> list[str]:
    options = {} if target in ("peft", "vllm", "sglang", "mlx") else {"base_config": BASE}
    return shlex.split(gralora.to_lora(adapter, out, target, **options)["command"])


BASE = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("target", ["peft", "vllm", "sglang"])
def test_programs_that_take_an_adapters_folder_get_its_files(adapter, tmp_path, target):
    words = export(adapter, tmp_path / "out", target)
    assert files(tmp_path / "out") == set(prompting.FILES)
    for name in prompting.FILES:
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    template = str(tmp_path / "out" / "chat_template.jinja")
    assert (template in words) == (target != "peft")
    if target == "vllm":
        assert words[words.index("--generation-config") + 1] == str(tmp_path / "out")


def test_llamacpp_is_told_the_ends_that_its_model_file_does_not_have(adapter, tmp_path):
    words = export(adapter, tmp_path / "out", "llamacpp")
    assert words[words.index("--chat-template-file") + 1] == str(tmp_path / "out" / "chat_template.jinja")
    overridden = [words[i + 1] for i, word in enumerate(words) if word == "--override-kv"]
    assert overridden == ["tokenizer.ggml.eot_token_id=int:40", "tokenizer.ggml.eom_token_id=int:50"]


def test_ollama_stops_at_all_of_them(adapter, tmp_path):
    export(adapter, tmp_path / "out", "ollama")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    expected = [f'PARAMETER stop "{text}"' for text in tokenizer.convert_ids_to_tokens([0, 40, 50])]
    assert lines[-3:] == expected and lines[-4] == "ADAPTER ./adapter.gguf"


def test_mlx_is_given_the_template_by_the_shell(adapter, tmp_path):
    command = gralora.to_lora(adapter, tmp_path / "o ut", "mlx")["command"]
    assert command.endswith(f" --chat-template \"$(cat '{tmp_path}/o ut/chat_template.jinja')\"")
    assert (tmp_path / "o ut" / "chat_template.jinja").read_text() == TEMPLATE


def test_conversions_and_merges_keep_them(adapter, tmp_path, tiny_model):
    gralora.convert_adapter(adapter, tmp_path / "converted", to="peft")
    gralora.merge_adapter(adapter, tmp_path / "merged", tiny_model)
    for folder in (tmp_path / "converted", tmp_path / "merged"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 40, 50]
        assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


def test_a_merge_in_memory_keeps_them(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted(model, gralora_config(target_modules=["embed_tokens"])).save_pretrained(tmp_path / "adapter")
    GenerationConfig(eos_token_id=[0, 50]).save_pretrained(tmp_path / "adapter")
    report = gralora.merge_adapter(tmp_path / "adapter", tmp_path / "merged", tiny_model)
    assert "in memory" in report["notices"][0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id == [0, 50]


def test_an_adapter_that_says_nothing_adds_nothing(adapter, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((adapter / name).read_bytes())
    for target in ("vllm", "llamacpp", "mlx"):
        words = export(tmp_path, tmp_path / target, target)
        assert not files(tmp_path / target) and not {"--chat-template", "--override-kv"} & set(words)


@pytest.mark.parametrize(
    "ends, message", [([999], "eos_token_id=999 .* is no token"), (["a"], "eos_token_id='a' .* is no token")]
)
def test_ends_that_are_no_tokens_are_refused(adapter, tmp_path, ends, message):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ValueError, match=message):
        gralora.to_lora(folder, tmp_path / "out", "ollama", base_config=BASE)
    assert not (tmp_path / "out").exists()
