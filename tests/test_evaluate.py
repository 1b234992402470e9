"""Evaluation: tasks of lm-evaluation-harness on one base, paired differences, and the loss that finetune reports."""

import itertools
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from helpers import adapted, gralora_config
from lm_eval import evaluator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gralora.tool import cli, evaluate
from gralora.tool.adapters import DTYPES
from gralora.tool.arguments import FinetuneArguments
from gralora.tool.data.examples import file_examples
from gralora.tool.data.layouts import Example
from gralora.tool.data.tokens import encode, prompt_ids
from gralora.tool.evaluate import FORMER, FORMER_TASKS, main, parse
from gralora.tool.evaluation import harness, loss
from gralora.tool.evaluation.paired import difference, estimate
from gralora.tool.finetune import finetune
from gralora.tool.side_by_side import load_side_by_side

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
QUESTIONS = [
    {"question": "Tom has 3 apples and buys 4.", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A box of 12, twice.", "answer": "#### 24"},
    {"question": "One thousand less 1.", "answer": "#### 999"},
]
CHOICES = [
    {"instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer": "answer2"},
    {"instruction": "Is it so?\n\nAnswer format: true/false", "input": "A passage.", "answer": "true"},
    {"instruction": "Go on:\n\nAnswer format: ending1/ending2/ending3/ending4", "answer": "ending1"},
]
CHOICES = [{"input": ""} | row for row in CHOICES]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, str]:
    """The tiny model as `base`, and adapters of it: `gralora`, `plain`, all with random non-zero factors."""
    folder = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "up_proj"]
    configs = {
        "gralora": gralora_config(k=2, r=8, hybrid_r=2, target_modules=targets),
        "plain": peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
    }
    for name, config in configs.items():
        model = adapted(AutoModelForCausalLM.from_pretrained(tiny_model), config)
        model.save_pretrained(folder / name)
    return {"base": str(tiny_model)} | {name: str(folder / name) for name in configs}


@pytest.fixture
def tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture
def run(capsys):
    """`gralora evaluate ... --json`, what it printed."""

    def run(*argv: object) -> dict:
        capsys.readouterr()
        main([*map(str, argv), "--json"])
        said = capsys.readouterr()
        assert "Running" not in said.err, "the harness's bars are for terminals"
        return json.loads(said.out)

    return run


# ---- several models on one base ------------------------------------------------------------------------------------


def test_each_model_is_what_it_is_alone(models):
    """In whatever order they are loaded and used."""
    ids = torch.arange(12)[None]
    expected = {}
    for name, path in models.items():
        alone = AutoModelForCausalLM.from_pretrained(models["base"])
        alone = alone if name == "base" else PeftModel.from_pretrained(alone, path)
        expected[name] = alone.eval()(input_ids=ids).logits
    assert not any(torch.allclose(*pair, atol=1e-3) for pair in itertools.combinations(expected.values(), 2))
    for order in itertools.permutations(models):
        loaded = load_side_by_side([models[name] for name in order])
        labels = dict(zip(order, loaded.adapters, strict=True))
        assert [labels["gralora"], labels["plain"]] == ["gralora", "plain"]
        for name in (*order, *reversed(order)):
            with loaded.using(labels[name]) as model:
                assert not model.training
                torch.testing.assert_close(model(input_ids=ids).logits, expected[name], atol=1e-5, rtol=0)


def test_base_alone(models):
    loaded = load_side_by_side([models["base"]], dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16 and list(loaded.adapters.values()) == [None]


def copy_adapter(source: str, folder: Path, **config: object) -> Path:
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_different_bases_are_refused(models, tmp_path):
    other = str(copy_adapter(models["plain"], tmp_path / "other", base_model_name_or_path="org/model"))
    with pytest.raises(ValueError, match=r"different base models.*gralora: .*tiny-llama.*; .*other: org/model"):
        load_side_by_side([models["gralora"], other])
    with pytest.raises(ValueError, match="different base models"):
        load_side_by_side([models["base"], other])
    assert len(load_side_by_side([models["gralora"], other, models["base"]], models["base"]).adapters) == 3
    nameless = str(copy_adapter(models["plain"], tmp_path / "nameless", base_model_name_or_path=None))
    with pytest.raises(ValueError, match="does not name its base model; give --base_model"):
        load_side_by_side([nameless])


def test_one_base_under_two_names_is_one(models, tmp_path):
    (tmp_path / "link").symlink_to(models["base"])
    assert len(load_side_by_side([models["plain"], str(tmp_path / "link")]).adapters) == 2


def test_labels(models, tmp_path):
    copy = str(copy_adapter(models["plain"], tmp_path / "plain"))
    assert list(load_side_by_side([models["plain"], copy]).adapters) == [models["plain"], copy]
    with pytest.raises(ValueError, match="is given twice"):
        load_side_by_side([copy, copy])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: {name: value * 0 if "lora_B" in name else value for name, value in t.items()}, "are zero"),
        (
            lambda t: {name: value for name, value in t.items() if "layers.1.self_attn" not in name},
            "(tensors are missing|no tensors of)",
        ),
        (lambda t: t | {"base_model.model.model.norm.weight": torch.ones(32)}, "1 tensors of the file have no place"),
        (lambda t: {name: value[:, :4] for name, value in t.items()}, "(does not fit|features|have shapes)"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "gralora"])
def test_an_adapter_that_does_not_fit_is_refused(models, tmp_path, kind, damage, message):
    folder = copy_adapter(models[kind], tmp_path / "broken")
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in damage(load_file(file)).items()}, file)
    with pytest.raises(ValueError, match=f"adapter '{folder}': .*{message}"):
        load_side_by_side([models["base"], str(folder)])


# ---- loss ----------------------------------------------------------------------------------------------------------


PROMPTS = ["def", "a", "def add(a, b): return a + b", "return", "b, a): def a", "add add add"]


def test_answer_losses_are_those_of_the_model(model, tokenizer):
    rows = [
        {"input_ids": ids, "labels": [-100] * 2 + ids[2:]} for ids in (prompt_ids(tokenizer, p * 3) for p in PROMPTS)
    ]
    for batch_size in (1, 4):
        for row, (total, count) in zip(rows, loss.answer_losses(model, rows, batch_size, pad_token_id=7), strict=True):
            with torch.no_grad():
                expected = model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss.item()
            assert count == len(row["input_ids"]) - 2
            assert total / count == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*has no effect without use_gralora")
def test_loss_is_the_one_that_finetune_reports(tiny_model, tmp_path, run):
    words = ["".join(letters) for letters in itertools.product("abcd", repeat=3)]
    rows = [{"instruction": f"Repeat {word}", "output": word * (1 + i % 5)} for i, word in enumerate(words[:40])]
    data = write_rows(tmp_path / "words.jsonl", rows)
    arguments = {"base_model": str(tiny_model), "data_path": str(data), "output_dir": str(tmp_path / "out")}
    arguments |= {"max_steps": 4, "batch_size": 4, "max_seq_length": 100, "val_set_size": 7, "lora_r": 8}
    trained = finetune(FinetuneArguments(**arguments, use_gralora=True, gralora_k=2, learning_rate=0.03))[
        "held_out_loss"
    ]

    flags = ("--task", "loss", "--data_path", data, "--max_seq_length", 100)
    results = run(tiny_model, tmp_path / "out", *flags, "--val_set_size", 7, "--batch_size", 4)
    assert results["items"] == 7
    for name, when in ((Path(tiny_model).name, "before"), ("out", "after")):
        assert results["results"][name]["loss"]["mean"] == pytest.approx(trained[when], rel=1e-5)
        assert results["results"][name]["perplexity"]["mean"] == pytest.approx(math.exp(trained[when]), rel=1e-4)
    assert trained["after"] < trained["before"]
    assert run(tiny_model, *flags)["items"] == 40
    assert run(tiny_model, *flags, "--limit", 3)["items"] == 3


def test_loss_without_data_is_on_what_finetune_holds_out(tiny_model, run, monkeypatch):
    held_out = [Example(f"def f{i}():\n", f"    return {i}") for i in range(9)]
    monkeypatch.setattr(loss, "stdlib_examples", lambda: ([], held_out))
    assert run(tiny_model, "--task", "loss", "--max_seq_length", 64)["items"] == 9


def test_texts_longer_than_the_model_are_refused(model):
    with pytest.raises(ValueError, match="row 1 has 129 tokens; the model can take 128: give --max_seq_length 128"):
        loss.answer_losses(model, [{"input_ids": [1] * 129, "labels": [1] * 129}], 1, 0)


# ---- tasks ---------------------------------------------------------------------------------------------------------


def harness_samples(folder: Path) -> dict[str, list[dict]]:
    """What the harness wrote of each model: its folder's name -> samples, by item."""
    found = {}
    for file in folder.glob("*/samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found.setdefault(file.parent.name, []).extend(sorted(rows, key=lambda row: (row["doc_id"], row["filter"])))
    return found


def test_multiple_choice_takes_the_likeliest_option(models, model, tokenizer, tmp_path, run):
    """Asked as finetune trains; the harness's scores are those of the models, each on its own."""
    data = write_rows(tmp_path / "test.jsonl", CHOICES)
    flags = ("--tasks", "instruction_choice", "--data_path", data, "--output_path", tmp_path / "out", "--log_samples")
    found = run(models["base"], models["gralora"], *flags, "--batch_size", 3)
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["base"]), models["gralora"]).eval()
    samples = harness_samples(tmp_path / "out")
    assert len(samples) == 2
    right = {}
    for alone, path in ((model, models["base"]), (adapter, models["gralora"])):
        label = Path(path).name
        (written,) = [rows for folder, rows in samples.items() if folder.endswith(label)]
        right[label] = []
        for row, sample in zip(CHOICES, written, strict=True):
            about = f"\n\n{row['input']}" if row["input"] else ""
            prompt = f"### Instruction:\n{row['instruction']}{about}\n\n### Response:"
            options = row["instruction"].rsplit(" ", 1)[1].split("/")
            likelihoods = []
            for option in options:
                ids = prompt_ids(tokenizer, prompt)
                # the harness counts white space at the end of a prompt to what follows
                answer = tokenizer(f"\nthe correct answer is {option}").input_ids
                with torch.no_grad():
                    logits = alone(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
                likelihoods.append(logits.log_softmax(-1)[range(len(answer)), answer].sum().item())
            assert [float(pair[0]) for pair in sample["filtered_resps"]] == pytest.approx(likelihoods, rel=1e-4)
            right[label].append(options[np.argmax(likelihoods)] == row["answer"])
            assert sample["acc"] == right[label][-1]
        results = found["models"][label]["results"]["instruction_choice"]
        assert results["acc,none"] == pytest.approx(np.mean(right[label]))
        assert results["acc_stderr,none"] == pytest.approx(np.std(right[label], ddof=1) / 3**0.5)
    (change,) = found["differences"]
    assert (change["model"], change["reference"], change["items"]) == ("gralora", Path(models["base"]).name, 3)
    assert change["difference"] == pytest.approx(np.mean(right["gralora"]) - np.mean(right[change["reference"]]))


def answers(monkeypatch, texts: list[str]) -> list[str]:
    """Let the harness's model answer with these texts; the prompts that it was given are returned, once there are."""
    prompts = []

    def generate_until(self, requests, **options):
        prompts.extend(request.args[0] for request in requests)
        return [texts[request.doc_id] for request in requests]

    monkeypatch.setattr(harness.HFLM, "generate_until", generate_until)
    return prompts


def test_gsm8k_of_a_local_file(tiny_model, tmp_path, run, monkeypatch):
    data, out = write_rows(tmp_path / "test.jsonl", QUESTIONS), tmp_path / "out.json"
    prompts = answers(monkeypatch, ["7 apples\n#### 7", "12 + 12 = 24", "#### 1,000 is wrong, 998"])
    found = run(tiny_model, "--tasks", "instruction_gsm8k", "--data_path", data, "--out", out)
    (results,) = (own["results"]["instruction_gsm8k"] for own in found["models"].values())
    assert results["exact_match,strict-match"] == pytest.approx(1 / 3)
    assert results["exact_match,flexible-extract"] == pytest.approx(2 / 3)
    assert prompts[0] == "### Instruction:\nTom has 3 apples and buys 4.\n\n### Response:\n"
    assert json.loads(out.read_text()) == found


def test_git_says_nothing_outside_of_a_repository(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with harness.git_only_in_a_repository():
        assert evaluator.get_git_commit_hash() is None
    assert capfd.readouterr().err == ""
    (tmp_path / ".git").mkdir()
    asked = evaluator.get_git_commit_hash
    with harness.git_only_in_a_repository():
        assert evaluator.get_git_commit_hash is asked


def test_generated_choice(tiny_model, tmp_path, run, monkeypatch):
    data = write_rows(tmp_path / "test.jsonl", CHOICES)
    answers(monkeypatch, ["the correct answer is answer2, not answer1", "the correct answer is false", "nothing"])
    found = run(tiny_model, "--tasks", "instruction_choice_generate", "--data_path", data)
    (results,) = (own["results"]["instruction_choice_generate"] for own in found["models"].values())
    assert results["exact_match,first-option"] == pytest.approx(1 / 3)


@pytest.fixture
def own_tasks(tmp_path) -> Path:
    """A folder of tasks of a user's, with a file of data beside them: one generates, one needs consent."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = write_rows(tmp_path / "sums.jsonl", [{"q": f"{i} + 1", "a": str(i + 1)} for i in range(6)])
    text = f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
training_split: train
fewshot_split: train
output_type: generate_until
doc_to_text: "{{{{q}}}} ="
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    (folder / "sums.yaml").write_text(text)
    (folder / "fixed.yaml").write_text(text.replace("task: sums", "task: fixed\nnum_fewshot: 0"))
    (folder / "code.yaml").write_text(text.replace("task: sums", "task: code\nunsafe_code: true"))
    (folder / "both.yaml").write_text(
        "group: both\ntask: [sums, fixed]\naggregate_metric_list: [{metric: exact_match, weight_by_size: true}]\n"
    )
    return folder


def test_tasks_of_a_folder_with_shots(tiny_model, own_tasks, run, monkeypatch):
    prompts = answers(monkeypatch, ["1", "2", "0", "0", "5", "6"])
    found = run(tiny_model, "--tasks", "sums,fixed", "--include_path", own_tasks, "--limit", 4)
    (own,) = found["models"].values()
    assert own["results"]["sums"]["exact_match,none"] == own["results"]["fixed"]["exact_match,none"] == 0.5
    assert prompts[0] == "0 + 1 ="
    prompts.clear()
    run(tiny_model, "--tasks", own_tasks / "sums.yaml", "--num_fewshot", 2, "--limit", 1)
    assert prompts[0].count("=") == 3 and prompts[0].endswith("0 + 1 =")
    with pytest.raises(ValueError, match="num_fewshot=2: task 'fixed' is defined with none"):
        run(tiny_model, "--tasks", "fixed", "--include_path", own_tasks, "--num_fewshot", 2)


def test_code_is_run_only_with_consent(tiny_model, own_tasks, run, monkeypatch):
    """Asked before any model is loaded, and before the task's own functions, which may fail for other reasons."""
    code = (own_tasks / "code.yaml").read_text().replace("task: code", "task: lost\ntag: [tagged]")
    (own_tasks / "lost.yaml").write_text(code.replace("metric: exact_match", "metric: !function nowhere.metric"))
    (own_tasks / "around.yaml").write_text("group: around\ntask: [sums, {task: lost, num_fewshot: 1}, code]\n")
    manager = harness.TaskManager(include_path=str(own_tasks), include_defaults=False)
    found = {name: harness.running_code(manager, name) for name in ("sums", "tagged", "around", "both")}
    assert found == {"sums": [], "tagged": ["lost"], "around": ["lost", "code"], "both": []}
    with pytest.raises(ValueError, match="^lost: such a task runs programs"):
        run(tiny_model, "--tasks", "lost", "--include_path", own_tasks)
    flags = ("--tasks", "sums,code", "--include_path", own_tasks)
    with monkeypatch.context() as patched:
        patched.setattr("gralora.tool.side_by_side.load_side_by_side", None)
        with pytest.raises(
            ValueError, match="^code: such a task runs programs.*--confirm_run_unsafe_code.*docker run"
        ):
            run(tiny_model, *flags)
    answers(monkeypatch, ["1"] * 6)
    assert run(tiny_model, *flags, "--confirm_run_unsafe_code")["models"]


METRIC = """
import os, subprocess, sys
import datasets, evaluate

class CodeEval(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions, references, k):
        if os.getenv("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("HF_ALLOW_CODE_EVAL")
        programs = [one + "\\n" + test for ones, test in zip(predictions, references) for one in ones]
        passed = [subprocess.run([sys.executable, "-c", one], capture_output=True).returncode == 0 for one in programs]
        return {"pass@1": sum(passed) / len(passed)}, {}
"""


@pytest.mark.slow
def test_humaneval_of_a_cached_data_set(tiny_model, tmp_path, run, monkeypatch):
    """Without the hub: its data set in the cache as `datasets` leaves it, and a stand-in there for the metric."""
    import datasets
    import evaluate as metrics

    row = {"task_id": "t", "entry_point": "add", "canonical_solution": "", "prompt": "def add(a, b):\n"}
    row["test"] = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
    rows = write_rows(tmp_path / "rows.jsonl", [row, row])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(metrics.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(metrics.config, "HF_EVALUATE_OFFLINE", True)
    datasets.load_dataset("json", data_files={"test": str(rows)})
    (made,) = (tmp_path / "datasets" / "json").glob("*/*/*/")
    name = "openai_humaneval"
    cached = tmp_path / "datasets" / f"openai___{name}" / name / "0.0.0" / made.name
    shutil.copytree(made, cached)
    (cached / "json-test.arrow").rename(cached / f"{name}-test.arrow")
    info = (cached / "dataset_info.json").read_text().replace('"dataset_name": "json"', f'"dataset_name": "{name}"')
    (cached / "dataset_info.json").write_text(info.replace('"config_name": "default"', f'"config_name": "{name}"'))
    module = tmp_path / "modules" / "evaluate_modules" / "metrics" / "evaluate-metric--code_eval" / ("0" * 64)
    module.mkdir(parents=True)
    for folder in (module, *module.parents[:3]):
        (folder / "__init__.py").touch()
    (module / "code_eval.py").write_text(METRIC)
    answers(monkeypatch, ["    return a + b\n", "    return a * b\n"])
    flags = (tiny_model, "--tasks", "humaneval", "--confirm_run_unsafe_code")
    with pytest.raises(ValueError, match="HF_ALLOW_CODE_EVAL"):
        run(*flags)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    (own,) = run(*flags)["models"].values()
    assert own["results"]["humaneval"]["pass@1,create_test"] == 0.5


def test_files_take_the_place_of_a_task_s_data(tiny_model, own_tasks, tmp_path, run, monkeypatch):
    asked = write_rows(tmp_path / "asked.jsonl", [{"q": "9 + 1", "a": "10"}])
    solved = write_rows(tmp_path / "solved.jsonl", [{"q": "7 + 1", "a": "8"}])
    prompts = answers(monkeypatch, ["10"])
    flags = (tiny_model, "--tasks", "sums", "--include_path", own_tasks, "--data_path", asked)
    (own,) = run(*flags, "--data_path", f"train={solved}", "--num_fewshot", 1)["models"].values()
    assert own["results"]["sums"]["exact_match,none"] == 1 and prompts == ["7 + 1 = 8\n\n9 + 1 ="]
    with pytest.raises(ValueError, match="'sums' puts 1 solved examples before each question; give a file of them"):
        run(*flags, "--num_fewshot", 1)
    with pytest.raises(ValueError, match="the data of one task, and these are 2"):
        run(tiny_model, "--tasks", "sums,fixed", "--include_path", own_tasks, "--data_path", asked)


def test_a_model_s_result_does_not_depend_on_the_others(models, own_tasks, tmp_path, run):
    """Also where answers are drawn at random."""
    flags = ("--tasks", "sums", "--include_path", own_tasks, "--batch_size", 2, "--log_samples")
    flags += ("--gen_kwargs", "do_sample=true,temperature=1.0", "--num_fewshot", 1)

    def texts(folder: str, *names: str, more: tuple = ()) -> dict[str, list]:
        run(*(models[name] for name in names), *flags, *more, "--output_path", tmp_path / folder)
        return {
            name.rsplit("_", 1)[-1]: [r["resps"] for r in s] for name, s in harness_samples(tmp_path / folder).items()
        }

    alone, together = texts("a", "plain"), texts("b", "base", "gralora", "plain")
    assert alone["plain"] == together["plain"]
    assert all(a != b for a, b in itertools.combinations(together.values(), 2))
    assert texts("c", "plain", more=("--seed", 5))["plain"] != alone["plain"]


def test_chat_template(tiny_model, own_tasks, tmp_path, run, monkeypatch):
    chatty = tmp_path / "chatty"
    shutil.copytree(tiny_model, chatty)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chatty)
    prompts = answers(monkeypatch, ["1"])
    flags = ("--tasks", "sums", "--include_path", own_tasks, "--limit", 1, "--num_fewshot", 1)
    run(chatty, *flags, "--apply_chat_template", "--system_instruction", "Add.")
    assert prompts[0].startswith("<system>Add.<user>") and prompts[0].endswith("<user>0 + 1 =<assistant>")
    assert prompts[0].count("<user>") == 2


def test_group(models, own_tasks, run, monkeypatch, capsys):
    answers(monkeypatch, ["1", "2", "0", "0", "5", "6"])
    flags = ("--tasks", "both", "--include_path", str(own_tasks))
    (own,) = run(models["base"], *flags)["models"].values()
    assert own["groups"]["both"]["exact_match,none"] == pytest.approx(4 / 6)
    main([models["base"], models["plain"], *flags])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-2:] == ["minus", f"{Path(models['base']).name}'s"]
    assert [line.split()[0] for line in lines[3:]].count("both") == 2


@pytest.mark.parametrize("by_size", [True, False])
def test_differences_of_a_group(models, own_tasks, run, monkeypatch, by_size):
    """Of two tasks of six and three items: weighted by size, or equally, as the group says."""
    few = (own_tasks / "sums.yaml").read_text().replace("task: sums", "task: few").replace("sums.jsonl", "few.jsonl")
    (own_tasks / "few.yaml").write_text(few)
    write_rows(own_tasks.parent / "few.jsonl", [{"q": f"{i} + 1", "a": str(i + 1)} for i in range(3)])
    rule = f"[{{metric: exact_match, weight_by_size: {str(by_size).lower()}}}]"
    (own_tasks / "pair.yaml").write_text(f"group: pair\ntask: [sums, few]\naggregate_metric_list: {rule}\n")
    texts = iter([["1", "2", "0", "0", "5", "6"], ["1", "2", "3", "0", "0", "0"]])  # the base's, the adapter's
    original = harness.language_model

    def language_model(*options):
        answers(monkeypatch, next(texts))
        return original(*options)

    monkeypatch.setattr(harness, "language_model", language_model)
    found = run(models["base"], models["plain"], "--tasks", "pair", "--include_path", own_tasks)
    (change,) = [row for row in found["differences"] if row["task"] == "pair"]
    # of the six: 4 against 3, of the three: 2 against 3
    expected = (3 + 3) / 9 - (4 + 2) / 9 if by_size else (3 / 6 + 3 / 3) / 2 - (4 / 6 + 2 / 3) / 2
    assert change["difference"] == pytest.approx(expected) and change["items"] == 9
    assert change["low"] < expected < change["high"]


def test_the_harness_s_own_command_gives_the_same(models, own_tasks, tmp_path, run):
    """`python -m gralora.plugins.lm_eval`, in a process of its own, as docs/evaluation.md has it."""
    flags = ["--tasks", "sums", "--include_path", str(own_tasks), "--num_fewshot", "1", "--batch_size", "2"]
    run(models["gralora"], *flags, "--log_samples", "--output_path", tmp_path / "ours")
    command = [sys.executable, "-m", "gralora.plugins.lm_eval", "--model", "hf", "--device", "cpu", "--model_args"]
    command += [f"pretrained={models['base']},peft={models['gralora']}", *flags]
    subprocess.run([*command, "--log_samples", "--output_path", str(tmp_path / "theirs")], check=True)
    ((ours,), (theirs,)) = (harness_samples(tmp_path / name).values() for name in ("ours", "theirs"))
    assert [row["resps"] for row in ours] == [row["resps"] for row in theirs]
    assert len({str(row["resps"]) for row in ours}) > 1


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (["--tasks", "no_such_task"], ValueError, "task 'no_such_task' is not known; `lm_eval ls tasks` lists"),
        (["--tasks", "missing.yaml"], FileNotFoundError, "there is no file 'missing.yaml'"),
        (["--tasks", "instruction_gsm8k"], ValueError, "'instruction_gsm8k' is for a file of yours; give --data_path"),
        (["--tasks", "x", "--include_path", "/missing"], FileNotFoundError, "include_path='/missing' is no folder"),
        (["--tasks", "x", "--data_path", "missing.jsonl"], FileNotFoundError, "data_path='missing.jsonl' is no file"),
        (["--tasks", "x", "--data_path", __file__], ValueError, "must end in .json, .jsonl, .csv, .parquet"),
    ],
)
def test_tasks_that_cannot_be(tiny_model, monkeypatch, run, flags, error, message):
    monkeypatch.setattr("gralora.tool.side_by_side.load_side_by_side", None)
    if "no_such_task" not in flags:  # without the harness's 14,000, which take seconds to read
        original = harness.TaskManager
        monkeypatch.setattr(harness, "TaskManager", lambda **o: original(**o | {"include_defaults": False}))
        monkeypatch.setattr(original, "match_tasks", lambda self, names: names)
    with pytest.raises(error, match=message):
        run(tiny_model, *flags)


def test_results_that_cannot_be_written(tiny_model, own_tasks, tmp_path, run, monkeypatch):
    """The harness logs that, and goes on."""
    answers(monkeypatch, ["1"] * 6)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the harness could not write"):
        run(tiny_model, "--tasks", "sums", "--include_path", own_tasks, "--output_path", tmp_path / "file" / "out")


# ---- differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, apart", [(10, 0.1), (30, 0.3), (100, 0.05), (40, 0.0)])
def test_intervals_of_paired_answers_cover(n, apart):
    """Of 400 draws, at least 93 % of the intervals hold the true difference; models agree on half of the items."""
    draw, held = random.Random(1), 0
    for _ in range(400):
        pairs = []
        for _ in range(n):
            same = draw.random() < 0.5
            a = draw.random() < 0.5
            b = a if same else draw.random() < 0.5 - 2 * apart / 2
            pairs.append((float(a), float(b)))
        _, low, high = difference(*zip(*pairs, strict=True))
        held += low <= 0.5 * apart <= high
    assert held >= 0.93 * 400


def test_models_that_agree_on_few_items_may_differ_on_more():
    value, low, high = difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert value == 0 and low < -0.3 and high > 0.3
    value, low, high = difference([1] * 4000, [1] * 4000)
    assert value == 0 and -0.002 < low < 0 < high < 0.002


def test_intervals_of_paired_losses():
    """Of items taken together, not apart; of few, they hold the true difference as often as of many."""
    draw = np.random.default_rng(0)
    hard = draw.normal(2, 1, 300)
    scores, reference = hard + draw.normal(-0.1, 0.2, 300), hard
    value, low, high = difference(list(scores), list(reference))
    half = 1.96 * (scores - reference).std(ddof=1) / 300**0.5
    assert value == pytest.approx((scores - reference).mean())
    assert value - low == pytest.approx(half, rel=0.1) and high - value == pytest.approx(half, rel=0.1)
    for n in (2, 3, 6):
        pairs = draw.normal(0.3, 0.2, (1000, n))
        held = [low <= 0.3 <= high for _, low, high in (difference(list(row), [0.0] * n) for row in pairs)]
        assert np.mean(held) == pytest.approx(0.95, abs=0.02)
    assert difference([2.5], [2.0]) == (0.5, None, None)
    with pytest.raises(ValueError, match="as many for both"):
        difference([1.0], [1.0, 2.0])


def test_differences_of_other_aggregations():
    """Here perplexity: exp of minus the mean of log-likelihoods."""

    def perplexity(values):
        return math.exp(-sum(values) / len(values))

    draw = np.random.default_rng(0)
    scores, reference = list(draw.normal(-2, 0.3, 200)), list(draw.normal(-2.2, 0.3, 200))
    value, low, high = difference(scores, reference, perplexity)
    assert value == pytest.approx(perplexity(scores) - perplexity(reference)) and low < value < high < 0
    few = draw.normal(0, 0.1, (200, 8))
    held = [low <= 0 <= high for _, low, high in (difference(list(row), [0.0] * 8, perplexity) for row in few)]
    assert 0.92 <= np.mean(held) <= 0.99


def test_estimate():
    draw = random.Random(3)
    values = [draw.gauss(5, 2) for _ in range(400)]
    mean, low, high = estimate(values)
    assert mean == pytest.approx(sum(values) / 400)
    assert mean - low == pytest.approx(1.96 * 2 / 20, rel=0.15) and high - mean == pytest.approx(0.196, rel=0.15)
    assert estimate([2.5]) == (2.5, None, None)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_table_of_losses(models, tmp_path, capsys):
    rows = [{"prompt": "def", "completion": " add" * (1 + i)} for i in range(5)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    main([*models.values(), "--task", "loss", "--data_path", str(data)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loss, 5 items; in brackets, 95 % confidence intervals"
    assert [line.split()[0] for line in lines[2:]] == ["model", Path(models["base"]).name, "gralora", "plain"]
    assert [line.count("[") for line in lines[3:]] == [2, 3, 3]


def test_what_is_known_is_shown_after_an_interruption(models, own_tasks, monkeypatch, capsys):
    original = harness.simple_evaluate

    def simple_evaluate(**options):
        if options["model_args"].get("peft") == models["plain"]:
            raise KeyboardInterrupt
        return original(**options)

    monkeypatch.setattr(harness, "simple_evaluate", simple_evaluate)
    answers(monkeypatch, ["1"] * 6)
    argv = ["evaluate", models["gralora"], models["plain"], "--tasks", "sums", "--include_path", str(own_tasks)]
    assert cli.main(argv) == cli.INTERRUPTED
    output = capsys.readouterr().out
    assert "gralora  0.1667" in output and output.endswith("\nnot finished: plain\n")


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (["--limit", "0"], ValueError, "limit=0 must be a number of items"),
        (["--limit", "-1"], ValueError, "limit=-1 must be at least 0"),
        (["--limit", "nan"], ValueError, "limit=nan must be at least 0"),
        (["--limit", "0.5"], ValueError, "limit=0.5: --task loss takes a number of items"),
        (["--batch_size", "0"], ValueError, "batch_size='0' must be a number from 1 on"),
        (["--batch_size", "auto"], ValueError, "batch_size='auto' is for --tasks"),
        (["--num_fewshot", "2"], ValueError, "num_fewshot=2 has no meaning with --task loss"),
        (["--data_path", "a", "--data_path", "b"], ValueError, "measures one at a time"),
        (["--out", __file__], FileExistsError, "exists; choose another name"),
        (["--out", "/missing/x.json"], FileNotFoundError, "in a folder that is not there"),
    ],
)
def test_wrong_arguments(flags, error, message):
    with pytest.raises(error, match=message):
        parse(["model", "--task", "loss", *flags])


def test_dtypes_are_those_of_other_commands():
    """Named here anew, since importing them would import torch for a line of help."""
    assert ("auto", *DTYPES) == evaluate.DTYPES


def test_wrong_arguments_of_tasks():
    for flags, message in [
        (["--val_set_size", "3"], "val_set_size=3 has no meaning with --tasks"),
        (["--log_samples"], "log_samples needs --output_path"),
        (["--output_path", "x.json"], "must be a folder"),
        (["--limit", "2.5"], "limit=2.5 must be a number of items"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(["model", "--tasks", "gsm8k", *flags])


@pytest.mark.parametrize("flag", FORMER)
def test_former_flags_say_what_to_type(flag):
    with pytest.raises(ValueError, match=f"{flag} is no longer known; give "):
        parse(["model", "--tasks", "gsm8k", flag, *(["3"] if flag != "--allow_code_execution" else [])])


@pytest.mark.parametrize("task", FORMER_TASKS)
def test_former_tasks_say_what_to_type(task, tmp_path):
    """And what they say to type is a task, for which this release asks no more than data or consent."""
    with pytest.raises(ValueError, match="is now lm-evaluation-harness's; type --tasks") as refused:
        parse(["model", "--task", task])
    name = str(refused.value).split("--tasks ")[1].split()[0]
    assert name == "humaneval" or (harness.TASKS / f"{name}.yaml").is_file()
    more = [word for word in ("--confirm_run_unsafe_code",) if word in str(refused.value)]
    assert parse(["model", "--tasks", name, *more]).tasks == [name]


def test_user_errors_have_no_trace(models, capsys):
    for argv, message in [
        (["./missing"], "base_model='./missing' could not be loaded"),
        ([models["plain"], "--data_path", "missing.jsonl"], "data_path='missing.jsonl' is no file"),
    ]:
        assert cli.main(["evaluate", *argv, "--task", "loss"]) == cli.USER_ERROR
        assert message in capsys.readouterr().err


def test_encoding_is_finetune_s(tokenizer, tmp_path):
    """The layout of instruction_gsm8k's prompts is the one that finetune trains on."""
    data = write_rows(tmp_path / "test.jsonl", QUESTIONS)
    row = encode(tokenizer, file_examples(data).examples, 128)[0]
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    args = parse(["m", "--tasks", "instruction_gsm8k", "--data_path", str(data)])
    task = harness.TaskSet(args).leaves["instruction_gsm8k"]
    assert prompt_ids(tokenizer, task.doc_to_text(QUESTIONS[0])) == prompt
