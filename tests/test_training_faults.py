"""What goes wrong in fine-tuning without an error: each is refused, or done, or said before training."""

import importlib
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights
from safetensors.torch import load_file, save_file
from test_families import FAMILIES, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaTokenizer

from gralora.checkpoints.files import locked
from gralora.tool import cli
from gralora.tool.data.corpus import Corpus
from gralora.tool.side_by_side import load_side_by_side
from gralora.tool.training.trainer import AdapterTrainer

WEIGHTS = "adapter_model.safetensors"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i} is", "completion": f" {i}{i}"}) for i in range(24)))
    return path


@pytest.fixture
def finetune(tiny_model, data, tmp_path, capfd):
    """The command, its exit status and what it printed."""

    def run(*flags: str, out: str = "out", **changes) -> tuple[int, str]:
        options = {"base_model": tiny_model, "data_path": data, "output_dir": tmp_path / out, "max_steps": 3}
        options |= {"batch_size": 2, "micro_batch_size": 2, "val_set_size": 4, "learning_rate": 1e-2, "seed": 3}
        options |= {"lora_r": 4, "use_gralora": True, "lora_target_modules": "q_proj", "max_seq_length": 100}
        options |= {"logging_steps": 1} | changes
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]
        capfd.readouterr()
        status = cli.main(["finetune", *words, *flags])
        printed = capfd.readouterr()
        return status, printed.out + printed.err

    return run


def metrics(folder: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)


# ---- an adapter's folder as the base model


@pytest.mark.parametrize(
    "kind", [{"use_gralora": True, "gralora_k": 2}, {"use_gralora": False}], ids=["gralora", "lora"]
)
def test_training_goes_on_with_the_adapter_that_is_given(finetune, tmp_path, tiny_model, kind):
    assert finetune(**kind)[0] == 0
    first = load_peft_weights(str(tmp_path / "out"))
    options = {"base_model": tmp_path / "out", "lora_r": None, "use_gralora": None, "gralora_k": None}
    options |= {"lora_target_modules": None, "max_steps": 1, "learning_rate": 1e-30, "warmup_steps": 0}
    status, printed = finetune(out="next", **options)
    assert status == 0 and f"going on with {tmp_path / 'out'}, on {tiny_model}" in printed
    second = load_peft_weights(str(tmp_path / "next"))
    assert first.keys() == second.keys() and any(first[name].any() for name in first if "lora_B" in name)
    for name in first:
        torch.testing.assert_close(second[name], first[name])
    config = json.loads((tmp_path / "next" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model) and config["target_modules"] == ["q_proj"]
    before, after = metrics(tmp_path / "out"), metrics(tmp_path / "next")
    assert after["held_out_loss"]["before"] == pytest.approx(before["held_out_loss"]["after"], rel=1e-5)
    assert after["arguments"]["lora_r"] == 4


@pytest.mark.parametrize("changes", [{"lora_r": 8}, {"lora_target_modules": "k_proj"}, {"hybrid_r": 2}])
def test_an_adapter_is_not_trained_as_another_one(finetune, tmp_path, tiny_model, changes):
    finetune()
    (name,) = changes
    status, printed = finetune(out="next", base_model=tmp_path / "out", **{"max_steps": 1} | changes)
    assert status == 2 and "training goes on with it" in printed and f"{name}=" in printed
    assert f"with --base_model {tiny_model}" in printed and not (tmp_path / "next").exists()


def test_a_checkpoint_can_be_trained_on_other_data(finetune, tmp_path, data):
    """What resuming refuses, and the advice that it gives."""
    finetune(save_steps=1)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("is", "was"))
    checkpoint = tmp_path / "out" / "checkpoint-2"
    status, printed = finetune(data_path=other, resume_from_checkpoint=checkpoint)
    assert status == 2 and "was trained on other data" in printed
    assert f"--base_model {checkpoint} and another output_dir" in printed
    assert finetune(out="next", data_path=other, base_model=checkpoint)[0] == 0


def test_what_goes_on_asks_and_stops_as_the_adapter_does(finetune, tmp_path, chat_model, capfd):
    """Its template and its ends are in its folder; those of the base model are others."""
    rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(6)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in rows))
    template = AutoTokenizer.from_pretrained(chat_model).chat_template.replace("|>", "|| ")
    (tmp_path / "chat.jinja").write_text(template)
    flags = {"base_model": chat_model, "data_path": tmp_path / "chats.jsonl", "max_steps": 1, "val_set_size": 0}
    assert finetune(f"--chat_template_path={tmp_path / 'chat.jinja'}", warmup_steps=0, **flags)[0] == 0
    flags |= {"base_model": tmp_path / "out", "use_gralora": None, "lora_r": None}
    status, printed = finetune(out="next", **flags)
    assert status == 0, printed
    assert AutoTokenizer.from_pretrained(tmp_path / "next").chat_template == template
    assert cli.main(["data", str(flags["data_path"]), f"--base_model={tmp_path / 'out'}"]) == 0
    shown = capfd.readouterr().out
    assert "<|user|| 0?" in printed and "<|user|| 0?" in shown
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}')
    assert finetune(out="pairs", **flags | {"data_path": tmp_path / "pairs.jsonl"})[0] == 0
    assert GenerationConfig.from_pretrained(tmp_path / "pairs").eos_token_id == [0, 5]


def test_an_adapter_is_no_base_model(finetune, tmp_path, tiny_model, data, capfd):
    """Beside a config.json, transformers would load the adapter and its base, and call that the base model."""
    finetune(max_steps=1, warmup_steps=0, val_set_size=0)
    adapter, beside = tmp_path / "out", shutil.copytree(tiny_model, tmp_path / "beside")
    shutil.copy(adapter / "adapter_config.json", beside)
    for base in (adapter, beside):
        for command, *flags in (["chat"], ["evaluate", "--task=loss", f"--data_path={data}"]):
            assert cli.main([command, str(adapter), f"--base_model={base}", *flags]) == 2
            said = capfd.readouterr().err
            assert f"base_model={str(base)!r} is an adapter; its base model is {str(tiny_model)!r}, give that" in said
    assert cli.main(["merge", str(adapter), str(tmp_path / "merged"), f"--base={adapter}"]) == 2
    assert f"is an adapter; its base model is {str(tiny_model)!r}, give that" in capfd.readouterr().err


# ---- figures of this run


def test_a_finished_run_is_measured_again(finetune, tmp_path, monkeypatch):
    """Nothing is left to train; the losses are measured, not taken out of the checkpoint's log."""
    finetune()
    loss = metrics(tmp_path / "out")["held_out_loss"]
    state = tmp_path / "out" / "checkpoint-3" / "trainer_state.json"
    log = json.loads(state.read_text())
    for row in log["log_history"]:
        row |= {"eval_loss": 99.0} if "eval_loss" in row else {}
    changed = json.dumps(log)
    state.write_text(changed + " " * (state.stat().st_size - len(changed)))
    contents = tmp_path / "out" / "checkpoint-3" / "gralora_checkpoint.json"
    found = json.loads(contents.read_text())
    found["files"]["trainer_state.json"] = state.stat().st_size
    contents.write_text(json.dumps(found))
    status, printed = finetune("--resume_from_checkpoint=latest")
    assert status == 0 and "nothing left to train" in printed
    assert metrics(tmp_path / "out")["held_out_loss"] == pytest.approx(loss, rel=1e-6)


# ---- what is cut


def test_what_is_cut_is_counted_before_training(finetune, tmp_path, data):
    rows = [{"prompt": "a", "completion": "b" * length} for length in [10] * 98 + [50, 60]]
    data.write_text("\n".join(map(json.dumps, rows)))
    status, printed = finetune(max_seq_length=32, val_set_size=0, max_steps=1)
    assert status == 0
    assert "cut: 2 of 100 texts are longer than max_seq_length=32 and lose their end" in printed
    assert "--max_seq_length 52 keeps 99% of the texts whole" in printed
    assert Corpus(None, [], {}, lengths=Counter({600: 2})).whole(512) == (
        "99% of the texts whole would need 600, and the model takes 512"
    ), "a length that the command refuses is not recommended"
    assert metrics(tmp_path / "out")["cut"] == {"examples": 2, "tokens": 20 + 30, "of_tokens": 98 * 12 + 52 + 62}
    assert "cut: " not in finetune("--overwrite", max_seq_length=64, val_set_size=0, max_steps=1)[1]
    printed = finetune("--overwrite", "--truncation_mode=keep_end", max_seq_length=32, val_set_size=0, max_steps=1)[1]
    assert "lose their beginning" in printed


def test_default_length_is_the_models_or_that_of_todays_data(finetune, tmp_path):
    finetune(max_seq_length=None, max_steps=1)
    assert metrics(tmp_path / "out")["arguments"]["max_seq_length"] == 128, "what the tiny model takes"


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_packing_that_divides_long_texts_loses_nothing(finetune, tmp_path, data, strategy):
    data.write_text("\n".join(json.dumps({"prompt": "", "completion": "ab" * 30}) for _ in range(8)))
    flags = ("--packing", f"--packing_strategy={strategy}")
    status, printed = finetune(*flags, max_seq_length=32, val_set_size=0, max_steps=1)
    tokenizer_tokens = metrics(tmp_path / "out")["cut"]["of_tokens"]
    assert status == 0 and "cut: " not in printed
    assert f"packed into {math.ceil(tokenizer_tokens / 32)} rows" in printed


def test_a_packed_row_of_a_prompt_alone_is_left_out(finetune, tmp_path, data):
    """Its loss is 0, and its step trains nothing."""
    data.write_text("\n".join(json.dumps({"prompt": "ab" * 60, "completion": "b"}) for _ in range(8)))
    flags = ("--packing", "--packing_strategy=wrapped")
    status, printed = finetune(
        *flags, max_seq_length=16, val_set_size=0, max_steps=4, batch_size=1, micro_batch_size=1
    )
    losses = [row["loss"] for row in metrics(tmp_path / "out")["history"] if "loss" in row]
    assert status == 0 and len(losses) == 4 and min(losses) > 1


# ---- where answers end


@pytest.fixture
def chat_model(tiny_model, tmp_path) -> Path:
    """Its template ends turns with a token at which the model's generation config does not stop."""
    folder = tmp_path / "chat"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML.replace("<turn>", tokenizer.convert_ids_to_tokens(5))
    tokenizer.add_tokens([tokenizer.convert_ids_to_tokens(5)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def conversations(data) -> Path:
    said = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(12)]
    data.write_text("\n".join(json.dumps({"messages": messages}) for messages in said))
    return data


def test_the_saved_generation_config_stops_where_training_stopped(finetune, chat_model, conversations, tmp_path):
    status, printed = finetune(base_model=chat_model, max_steps=1)
    assert status == 0 and "stops: answers end with" in printed
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [0, 5]


def test_answers_without_an_end_are_counted(finetune, chat_model, conversations):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = CHATML.replace("<turn>", "")
    tokenizer.save_pretrained(chat_model)
    status, printed = finetune(base_model=chat_model, max_steps=1)
    assert status == 0 and "no end: 8 of 8 texts" in printed


def test_tokens_beyond_the_embeddings_are_refused(finetune, tiny_model, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    status, printed = finetune(base_model=folder)
    assert status == 2 and "has embeddings for 270 tokens" in printed and "'<|im_end|>' (270)" in printed


@pytest.mark.parametrize("flags", [[], ["--streaming"]], ids=["in memory", "stream"])
def test_tokens_of_the_data_beyond_the_embeddings_are_refused(finetune, tiny_model, data, tmp_path, flags):
    """A token without a role may have no embedding, as in T5's models, while nothing in the data has it."""
    shutil.copytree(tiny_model, tmp_path / "small")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(1 + max(tokenizer(data.read_text()).input_ids))
    model.save_pretrained(tmp_path / "small")
    assert finetune(*flags, base_model=tmp_path / "small")[0] == 0
    data.write_text('{"prompt": "a", "completion": " def add"}\n' + data.read_text())
    for held_out in (4, 0):
        status, printed = finetune(*flags, "--overwrite", base_model=tmp_path / "small", val_set_size=held_out)
        assert status == 2 and "its tokenizer makes " in printed and "in the data token 26" in printed, printed


def test_another_template_and_end(finetune, tiny_model, conversations, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML.replace("<turn>", "<end>"))
    assert finetune(max_steps=1)[0] == 2, "the tiny model has no template"
    status, printed = finetune(f"--chat_template_path={template}", max_steps=1)
    assert status == 0 and "<|user|>" in printed
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template.read_text()
    assert "eos_token='<nothing>' is no token" in finetune("--eos_token=<nothing>", out="x")[1]


@pytest.mark.parametrize("legacy", [True, False])
def test_the_saved_tokenizer_makes_the_tokens_that_were_trained_on(finetune, tmp_path, tiny_model, legacy):
    """transformers does not save `legacy`, by which Llama's tokenizers put a space after each special token."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}, "▁": 258, "is": 259}
    LlamaTokenizer(vocabulary, [], bos_token=None).save_pretrained(base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": legacy}))
    assert finetune(base_model=base)[0] == 0
    text = "it is</s>is it"
    trained, saved = (AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (base, tmp_path / "out"))
    assert saved == trained and (trained[trained.index(1) + 1] == 258) == legacy


# ---- training that goes wrong


@pytest.fixture
def poison(monkeypatch):
    """Make a loss, or the adapter after a step, not finite."""

    def at(step: int, what: str, value: float) -> None:
        training_step = AdapterTrainer.training_step

        def poisoned(self, *args, **options):
            if what == "adapter" and self.state.global_step == step - 1:
                next(p for p in self.model.parameters() if p.requires_grad).data.view(-1)[0] = value
            loss = training_step(self, *args, **options)
            if what == "loss" and self.state.global_step == step - 1:
                self.recent_losses[-1] = torch.tensor(value)
            return loss

        monkeypatch.setattr(AdapterTrainer, "training_step", poisoned)

    return at


@pytest.mark.parametrize("what, value", [("loss", math.nan), ("loss", math.inf), ("adapter", math.nan)])
def test_a_run_that_diverges_ends_and_keeps_the_adapter_before(finetune, tmp_path, poison, what, value):
    finetune()
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    poison(2, what, value)
    status, printed = finetune("--overwrite", save_steps=1)
    assert status == 2 and "training diverged: " in printed and "at step 2 of 3" in printed
    assert "Try a lower learning_rate (now 0.01)" in printed
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"], "none of a broken step"
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "out" / "checkpoint-1" / WEIGHTS).values())
    metrics(tmp_path / "out")


def test_a_learning_rate_that_is_too_high(finetune, tmp_path):
    """A real one, that ends in infinite factors."""
    status, printed = finetune(learning_rate=1e38, warmup_steps=0, optim="sgd", max_grad_norm=0, max_steps=20)
    assert status == 2 and "training diverged" in printed and not (tmp_path / "out" / WEIGHTS).exists()


@pytest.fixture
def knowing(tiny_model, data, tmp_path) -> Path:
    """The tiny model after some steps on the data, so that there is something to lose."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for row in map(json.loads, data.read_text().splitlines()):
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"]).input_ids])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "knowing")
    tokenizer.save_pretrained(tmp_path / "knowing")
    return tmp_path / "knowing"


def test_a_finite_loss_of_nothing_learnt(finetune, tmp_path, knowing):
    """Layers whose output is so large that nothing else is seen."""
    finetune(base_model=knowing)
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    huge = {"base_model": knowing, "learning_rate": 1e15, "warmup_steps": 0, "max_steps": 4}
    huge["lora_target_modules"] = "down_proj"
    for others in ({}, {"val_set_size": 0}, {"logging_steps": 100}):
        status, printed = finetune("--overwrite", **huge | others)
        assert status == 2 and "loss was" in printed and "tokens drawn by lot would have 5.598" in printed, printed
        assert "Try a lower learning_rate (now 1e+15)" in printed
        assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("rate, said", [(1e-30, "learnt nothing: "), (0.3, "is worse than what"), (1e-2, None)])
def test_an_adapter_that_is_no_better_is_called_so(finetune, tmp_path, knowing, rate, said):
    status, printed = finetune(base_model=knowing, learning_rate=rate, warmup_steps=0)
    assert status == 0 and (f"\nnotice: the adapter {said}" in printed) == bool(said), printed
    notice = metrics(tmp_path / "out")["notice"]
    assert said in notice if said else notice is None


def test_a_run_of_the_warmup_alone_is_not_called_a_low_rate(finetune, tmp_path, knowing):
    status, printed = finetune(base_model=knowing, max_steps=1)
    assert status == 0 and "the only step is the first of a warmup, whose rate is 0" in printed
    assert "higher learning_rate" not in printed


def of_another_kind(name: str, tokenizer: Path, folder: Path) -> Path:
    """A model of a class of `FAMILIES`, with room for the tokens of a tokenizer, which is that of a folder."""
    sizes = {"vocab_size": 300, "max_position_embeddings": 128}
    text = FAMILIES[name].get("text_config")
    make_model(name, **({"text_config": text | sizes} if text else sizes)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
    return folder


@pytest.mark.parametrize(
    "name, targets, layers",
    [
        ("Gemma3ForConditionalGeneration", None, 2),  # PEFT's choice for its text model
        ("Gemma3ForConditionalGeneration", "all-linear", 7),  # a layer beside it is one that none can adapt
        ("LlavaForConditionalGeneration", "k_proj", 1),  # has no form for text alone
    ],
)
def test_a_model_that_reads_pictures_too(finetune, tmp_path, tiny_model, name, targets, layers):
    base = of_another_kind(name, tiny_model, tmp_path / "base")
    status, printed = finetune(base_model=base, lora_target_modules=targets, val_set_size=0)
    assert status == 0 and "only text is trained on, so model.vision_tower, model.multi_modal" in printed, printed
    factors = {n: t for n, t in load_peft_weights(str(tmp_path / "out")).items() if "_B" in n}
    assert len(factors) == 2 * layers and all(t.any() and ".language_model." in n for n, t in factors.items())
    assert len(load_side_by_side([str(tmp_path / "out")]).adapters) == 1


@pytest.mark.parametrize(
    "name, kind", [("Olmo2ForCausalLM", "olmo2"), ("Qwen2VLForConditionalGeneration", "qwen2_vl")]
)
def test_a_model_that_peft_does_not_know(finetune, tmp_path, tiny_model, name, kind):
    """PEFT's own message names no flag. What ours names can be trained."""
    base = of_another_kind(name, tiny_model, tmp_path / "base")
    status, printed = finetune(base_model=base, lora_target_modules=None)
    assert status == 2 and f"model_type={kind!r}; give --lora_target_modules all-linear" in printed
    status, printed = finetune(base_model=base, lora_target_modules="all-linear", val_set_size=0)
    assert status == 0, printed


def test_a_model_that_continues_no_text(finetune, tmp_path, tiny_model):
    """transformers' message is a list of two hundred classes."""
    base = of_another_kind("T5ForConditionalGeneration", tiny_model, tmp_path / "base")
    status, printed = finetune(base_model=base)
    assert status == 2 and "model_type='t5', and transformers has no model of this kind that continues" in printed


def test_a_file_in_the_place_of_the_folder(finetune, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, said = finetune(out="file", base_model="not looked at")
    assert status == 2 and "output_dir=" in said and "is a file" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_into_one_folder(finetune, tmp_path):
    out = tmp_path / "out"
    with locked(tmp_path / ".out.lock", out):
        status, printed = finetune()
    assert status == 2 and f"'{out}' is being written by process" in printed and not out.exists()
    assert finetune()[0] == 0 and not (tmp_path / ".out.lock").exists()


def test_the_merged_model_has_the_template_and_ends_of_training(finetune, chat_model, conversations, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML.replace("<turn>", "<end>"))
    assert finetune(f"--chat_template_path={template}", base_model=chat_model)[0] == 0
    assert cli.main(["merge", str(tmp_path / "out"), str(tmp_path / "merged"), "--base", str(chat_model)]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == template.read_text()
    ends = [GenerationConfig.from_pretrained(tmp_path / name).eos_token_id for name in ("out", "merged")]
    assert ends[0] == ends[1]
    loaded = load_side_by_side([str(tmp_path / "out")])
    assert loaded.tokenizer.chat_template == template.read_text(), "and in chat"


# ---- checkpoints that are not whole


def test_a_checkpoint_without_its_schedule(finetune, tmp_path):
    finetune()
    for name in ("scheduler.pt", "rng_state.pth"):
        checkpoint = tmp_path / name / "checkpoint-3"
        shutil.copytree(tmp_path / "out" / "checkpoint-3", checkpoint)
        (checkpoint / name).unlink()
        status, printed = finetune(out="next", max_steps=6, resume_from_checkpoint=checkpoint)
        assert status == 2 and f"{name} is missing" in printed


def test_a_checkpoint_without_a_tensor(finetune, tmp_path):
    """Also where nothing says how large its file was."""
    finetune(save_steps=1)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    tensors = load_file(checkpoint / WEIGHTS)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, checkpoint / WEIGHTS)
    status, printed = finetune(resume_from_checkpoint=checkpoint)
    assert status == 2 and f"{WEIGHTS} is not as it was written" in printed
    (checkpoint / "gralora_checkpoint.json").unlink()
    status, printed = finetune(resume_from_checkpoint=checkpoint)
    assert status == 2 and "is not whole" in printed and f"lacks '{name}'" in printed


class Malicious:
    def __reduce__(self):
        return print, ("CODE RAN",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("is_allowed", [False, True], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_pickle_with_code_is_refused_without_a_trace(finetune, tmp_path, monkeypatch, name, is_allowed):
    """Also where the environment lets torch.load run code by default (CVE-2026-1839 was such a call)."""
    finetune(save_steps=1)
    if is_allowed:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    torch.save({"state": Malicious()}, checkpoint / name)
    (checkpoint / "gralora_checkpoint.json").unlink()
    status, printed = finetune(resume_from_checkpoint=checkpoint)
    assert status == 2 and "holds objects that are no tensors" in printed
    assert "Traceback" not in printed and "CODE RAN" not in printed


@pytest.mark.parametrize("step", [10**9, -1, "3", 2.5, None])
def test_an_absurd_step_is_not_believed(finetune, tmp_path, step):
    finetune(save_steps=1)
    state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": step}))
    (state.parent / "gralora_checkpoint.json").unlink()
    status, printed = finetune(resume_from_checkpoint=state.parent)
    assert status == 2 and f"global_step={step!r}" in printed


def test_an_adapter_is_trained_on_in_its_own_folder(finetune, tmp_path):
    """Its file is still open while the new one is written (transformers' issue 37713): never a mixture of the two."""
    finetune()
    first = load_file(tmp_path / "out" / WEIGHTS)
    status, printed = finetune("--overwrite", base_model=tmp_path / "out", learning_rate=1e-2)
    assert status == 0, printed
    second = load_file(tmp_path / "out" / WEIGHTS)
    assert first.keys() == second.keys() and any(not first[name].equal(second[name]) for name in first)


# ---- what SFTConfig and the Trainer offer, by its own name


@pytest.mark.parametrize(
    "flags",
    [
        ("--torch_compile", "--torch_compile_backend=eager"),
        ("--padding_free",),
        ("--loss_type=dft",),
        ("--dataloader_num_workers=0", "--adam_beta2=0.9", "--lr_scheduler_kwargs={}"),
        ("--activation_checkpointing",),
        ("--use_rslora", "--neftune_noise_alpha=5", "--group_by_length=x"),
    ],
    ids=lambda flags: flags[0].strip("-").split("=")[0],
)
def test_fields_of_the_trainer_are_flags(finetune, tmp_path, flags):
    if "--group_by_length=x" in flags:
        with pytest.raises(SystemExit):
            finetune(*flags)
        return
    assert finetune(out="usual")[0] == 0
    status, printed = finetune(*flags)
    assert status == 0, printed
    usual, other = metrics(tmp_path / "usual"), metrics(tmp_path / "out")
    name = flags[0].strip("-").split("=")[0]
    assert name in other["arguments"] or name == "activation_checkpointing"
    same = [row["loss"] for row in usual["history"] if "loss" in row]
    losses = [row["loss"] for row in other["history"] if "loss" in row]
    if name == "loss_type":
        assert losses != pytest.approx(same, rel=1e-3), "another loss"
    elif name == "dataloader_num_workers":
        assert losses == pytest.approx(same, rel=1e-2) and losses != same, "another optimizer"
    else:
        assert losses == pytest.approx(same, rel=1e-5), "the same losses, computed otherwise"


def test_blocks_are_compiled_alone(finetune, tmp_path, monkeypatch):
    """accelerate has a variable for it: the blocks are compiled, the model is not, and what is learnt is the same."""
    compiled, compile_it = [], torch.compile

    def count(module, **options):
        compiled.append(type(module).__name__)
        return compile_it(module, **options)

    assert finetune(out="usual", lora_target_modules="all-linear")[0] == 0
    monkeypatch.setattr(torch, "compile", count)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    flags = "--torch_compile", "--torch_compile_backend=eager"
    status, printed = finetune(*flags, lora_target_modules="all-linear")
    assert status == 0, printed
    blocks = AutoModelForCausalLM.from_pretrained(metrics(tmp_path / "out")["arguments"]["base_model"]).model.layers
    assert compiled.count("LlamaDecoderLayer") == len(blocks) and "LlamaForCausalLM" not in compiled
    usual, other = (load_file(tmp_path / out / WEIGHTS) for out in ("usual", "out"))
    assert usual.keys() == other.keys() and all(torch.allclose(usual[name], other[name], atol=1e-5) for name in usual)


def test_fields_of_the_trainer_in_a_file(finetune, tmp_path):
    """An object where the field takes one; an unknown name is refused with near ones."""
    path = tmp_path / "c.yaml"
    path.write_text("lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 2}\nadam_beta1: 0.8\n")
    assert finetune(f"--config={path}")[0] == 0
    found = metrics(tmp_path / "out")["arguments"]
    assert json.loads(found["lr_scheduler_kwargs"]) == {"num_cycles": 2} and found["adam_beta1"] == 0.8
    path.write_text("adam_beta: 0.8\n")
    status, printed = finetune(f"--config={path}", out="x")
    assert status == 2 and "unknown key 'adam_beta'; did you mean adam_beta" in printed


@pytest.mark.parametrize(
    "flag, learnt", [("--completion_only_loss=false", True), ("--assistant_only_loss=true", False)], ids=str
)
def test_what_is_learnt_by_trls_names(finetune, tmp_path, flag, learnt):
    status, printed = finetune(flag, max_steps=1)
    assert status == 0 and metrics(tmp_path / "out")["arguments"]["train_on_inputs"] is learnt
    status, printed = finetune("--completion_only_loss=true", "--train_on_inputs", out="x")
    assert status == 2 and "contradict each other" in printed


def test_several_data_sets_with_weights(finetune, tmp_path, data):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"other {i}"}) for i in range(6)))
    flags = ("--data_path", str(data), str(other))
    assert finetune(*flags, data_path=None, val_set_size=0, max_steps=1)[0] == 0
    assert metrics(tmp_path / "out")["examples"]["train"] == 24 + 6
    weighted = (*flags, "--data_weights", "1", "1")
    assert finetune(*weighted, out="weighted", data_path=None, val_set_size=0, max_steps=1)[0] == 0
    assert metrics(tmp_path / "weighted")["examples"]["train"] > 40, "the smaller one comes as often as the larger"
    status, printed = finetune(*flags, "--data_weights", "1", out="x", data_path=None)
    assert status == 2 and "must be as many numbers as there are data_path, of which there are 2" in printed


def test_an_adapter_goes_to_the_hub(finetune, tmp_path, monkeypatch):
    """Once, at the end, with the card that we write and without checkpoints."""
    uploads = []

    def upload(**options):
        folder = Path(options["folder_path"])
        uploads.append((sorted(path.name for path in folder.iterdir()), (folder / "README.md").read_text(), options))

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **options: upload(**options))
    repo = type("Url", (), {"repo_id": "me/mine"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *_, **__: repo)
    # older transformers have these by name
    monkeypatch.setattr("transformers.trainer.create_repo", lambda *_, **__: repo, raising=False)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload, raising=False)
    status, printed = finetune("--push_to_hub", "--hub_model_id=me/mine", "--hub_strategy=end", max_steps=1)
    assert status == 0, printed
    (names, card, options) = uploads[-1]
    assert {WEIGHTS, "adapter_config.json", "README.md", "metrics.json"} <= set(names)
    assert "Written by `gralora finetune`" in card and "checkpoint-*" in str(options["ignore_patterns"])


# ---- before training


def test_dry_run_trains_and_writes_nothing(finetune, tmp_path, data):
    status, printed = finetune("--dry_run", max_steps=None, num_train_epochs=2)
    assert status == 0 and not (tmp_path / "out").exists()
    assert "training GraLoRA r=4" in printed and "dry run, nothing is trained or written:" in printed
    assert "steps: 20, of about " in printed, "20 examples in batches of 2, twice"
    for words in ("tokens/s", "time: about 0:00:", "memory: about ", "less: --bf16", "less: --quantization 4bit"):
        assert words in printed
    status, printed = finetune("--dry_run", "--json")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert found["steps"] == 3 and found["parameters"]["trainable"] > 0 and found["peak_memory_gib"] > 0
    assert finetune("--dry_run", base_model="./missing")[0] == 2


def test_dry_run_times_rows_as_they_are_drawn(finetune, monkeypatch):
    """Time is that of whole micro-batches with their padding, not of the longest one's tokens."""
    module = importlib.import_module("gralora.tool.training.dry_run")
    seen = []

    def measured(trainer, batch):
        seen.append(batch["input_ids"].numel())
        return 1.0 if len(seen) > 2 else 99.0  # the first of a shape compile

    monkeypatch.setattr(module, "measured", measured)
    status, printed = finetune("--dry_run", "--json", "--gradient_accumulation_steps", "2", batch_size=4, max_steps=7)
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert status == 0 and len(seen) == 2 + module.BATCHES
    assert seen[0] == max(seen) == found["longest_tokens"]
    assert (found["step_s"], found["time_s"]) == (2.0, 14.0)
    assert found["tokens_per_s"] == round(found["tokens_per_step"] / 2, 1)


def test_dry_run_counts_steps_as_the_trainer_does(finetune, tmp_path):
    """The last step of an epoch may have fewer micro-batches, and the last epoch may be a part of one."""
    settings = {"batch_size": 16, "max_steps": None, "num_train_epochs": 1.5}
    status, printed = finetune("--dry_run", "--json", **settings)
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert finetune(**settings)[0] == status == 0
    assert found["steps"] == json.loads((tmp_path / "out" / "metrics.json").read_text())["steps"] == 3


def test_data_shows_what_files_become(chat_model, conversations, capsys):
    flags = ["data", str(conversations), "--base_model", str(chat_model), "--rows", "1", "--max_seq_length", "30"]
    assert cli.main(flags) == 0
    printed = capsys.readouterr().out
    assert "rows with something to train on: 12 of messages" in printed
    assert "<|assistant|>>>>0." in printed and "answers end with: " in printed and "12 texts, " in printed
    assert "cut at 30 tokens: " in printed
    assert cli.main([*flags, "--color", "always"]) == 0
    assert "<|assistant|>\033[32m0." in capsys.readouterr().out
    assert cli.main([*flags, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["texts"] == 12 and counts["lengths"]["100%"] >= counts["lengths"]["50%"] > 0
    tight = [*flags[:-1], str(counts["lengths"]["50%"] - 1)]
    assert cli.main([*flags[:-1], "200", "--json"]) == 0
    (end,) = json.loads(capsys.readouterr().out)["ends"]
    assert cli.main([*tight, "--truncation_mode", "keep_end"]) == 0  # loses beginnings, so the ends are still there
    assert f"answers end with: {end!r}" in capsys.readouterr().out
    conversations.write_text("{")
    assert cli.main(flags) == 2 and "line 1: not JSON" in capsys.readouterr().err


def test_factors_of_a_quantised_base_stay_in_float32(finetune, tmp_path, monkeypatch):
    """TRL rounds them to bfloat16, which loses updates that are smaller than that can tell apart."""
    pytest.importorskip("bitsandbytes")
    seen = []
    trained = AdapterTrainer.training_step

    def watched(self, *args, **options):
        seen.append({p.dtype for p in self.model.parameters() if p.requires_grad})
        return trained(self, *args, **options)

    monkeypatch.setattr(AdapterTrainer, "training_step", watched)
    assert finetune("--bf16", quantization="4bit", max_steps=1)[0] == 0
    assert seen == [{torch.float32}]
