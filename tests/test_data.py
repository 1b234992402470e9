"""Training text: where it comes from, how it is split, and which tokens carry the loss."""

import ast
import csv
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gralora.tool.data import layouts as data
from gralora.tool.data import stdlib as stdlib_module
from gralora.tool.data.conversations import Chat
from gralora.tool.data.examples import file_examples, split
from gralora.tool.data.layouts import Example
from gralora.tool.data.stdlib import stdlib_examples
from gralora.tool.data.tokens import IGNORED, encode, marked, prompt_ids


@pytest.fixture(scope="module")
def stdlib() -> tuple[list[Example], list[Example]]:
    return stdlib_examples()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def function(name: str, answer: str) -> str:
    return f'def {name}(x):\n    """Do {name}."""\n    {answer}\n\n\n'


# ---- the standard library


def test_stdlib_is_large_and_every_pair_is_a_function(stdlib):
    train, held_out = stdlib
    assert len(train) > 2000 and len(held_out) > 200
    for prompt, completion in train[:300] + held_out[:100]:
        (node,) = ast.parse(prompt + completion).body
        assert ast.get_docstring(node) is not None
        (docstring,) = ast.parse(prompt).body[0].body
        assert isinstance(docstring.value, ast.Constant), "the prompt must end with the docstring"


def test_no_held_out_answer_was_trained_on(stdlib):
    train, held_out = stdlib
    trained = {completion for _, completion in train}
    assert not [completion for _, completion in held_out if completion in trained]


def test_split_is_by_module(tmp_path):
    """All functions of one module are on one side, whatever file of the package they are in."""
    names = ["json", "email", "logging", "tarfile", "asyncio", "enum"]
    for name in names:
        for file in ("__init__.py", "part.py"):
            write(tmp_path / name / file, function(f"{name}_{file[:4]}", f"return {name!r} + {file!r}"))
    train, held_out = stdlib_examples(tmp_path)
    owners = [{example.completion.split("'")[1] for example in side} for side in (train, held_out)]
    assert len(train) + len(held_out) == 2 * len(names)
    assert owners[0] and owners[1] and not owners[0] & owners[1]
    assert stdlib_examples(tmp_path) == (train, held_out)


def test_private_module_goes_with_the_public_one():
    assert stdlib_module.is_held_out("_tarfile.py") == stdlib_module.is_held_out("tarfile") is True
    assert stdlib_module.is_held_out("_json.py") == stdlib_module.is_held_out("json") is False


def test_a_function_occurs_once(tmp_path):
    """Equal code with another name, comment or layout is the same answer, within a side and across."""
    write(tmp_path / "json.py", function("a", "return x + 1") + function("b", "return (x+1)  # again"))
    write(tmp_path / "tarfile.py", function("c", "return x+1") + function("d", "return x + 2"))
    train, held_out = stdlib_examples(tmp_path)
    assert [example.completion for example in train] == ["    return x + 1"]
    assert [example.completion for example in held_out] == ["    return x + 2"]


def test_what_is_no_function_to_learn_is_left_out(tmp_path):
    write(
        tmp_path / "json.py",
        function("kept", "return x")
        + function("placeholder", "pass")
        + 'def on_one_line(x): "Doc."; return x\n'
        + 'def docstring_only(x):\n    "Doc."\n'
        + "def no_docstring(x):\n    return x + 5\n",
    )
    write(tmp_path / "tarfile.py", function("held_out", "return -x"))
    write(tmp_path / "csv.py", "def broken(:\n")
    write(tmp_path / "bdb.py", "").write_bytes(b"# \xff\n")
    write(tmp_path / "ctypes" / "test" / "cases.py", function("test", "return 7"))
    write(tmp_path / "site_module.py", function("foreign", "return 8"))
    train, held_out = stdlib_examples(tmp_path)
    assert [example.completion for example in train + held_out] == ["    return x", "    return -x"]


def test_methods_are_cut_after_the_docstring_and_dedented(tmp_path):
    source = (
        "class A:\n"
        "    @property\n"
        "    def f(self):\n"
        '        """One.\n\n        Two.\n        """\n'
        "        # a comment\n"
        "        def inner():\n"
        '            """Not a pair of its own."""\n'
        "            return 1\n"
        "        return inner\n"
    )
    ((example, _),) = stdlib_module.function_examples(write(tmp_path / "a.py", source))
    assert example.prompt == 'def f(self):\n    """One.\n\n    Two.\n    """\n'
    assert example.completion.startswith("    # a comment\n    def inner():\n")
    assert example.completion.endswith("\n    return inner")


def test_missing_source_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--data_path"):
        stdlib_examples(tmp_path)


# ---- files


RECORDS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3", "note": "ignored"},
    {"instruction": "Greet.", "input": "", "output": "Hello"},
    {"prompt": "a", "completion": "b"},
    {"query": "2 + 2?", "response": "4", "type": "ignored"},
    {"question": "3 + 3?", "answer": "6"},
    {"text": "plain"},
]
EXAMPLES = [
    Example("### Instruction:\nAdd.\n\n1 and 2\n\n### Response:\n", "3"),
    Example("### Instruction:\nGreet.\n\n### Response:\n", "Hello"),
    Example("a", "b"),
    Example("### Instruction:\n2 + 2?\n\n### Response:\n", "4"),
    Example("### Instruction:\n3 + 3?\n\n### Response:\n", "6"),
    Example("", "plain"),
]


def test_jsonl_and_json_records(tmp_path):
    lines = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, RECORDS)) + "\n")
    found = file_examples(lines)
    assert found.examples == EXAMPLES
    kinds = [kind for kind in data.RECORD_NAMES if kind not in ("messages", "conversations")]
    assert found.kinds == {kind: 2 if kind == "instruction+output" else 1 for kind in kinds}
    for indent in (None, 2):
        assert file_examples(write(tmp_path / "a.json", json.dumps(RECORDS, indent=indent))).examples == EXAMPLES
    assert file_examples(write(tmp_path / "b.json", lines.read_text())).examples == EXAMPLES, "lines in a .json"


def test_csv_and_parquet_records(tmp_path):
    """One kind per file, since all rows have the same columns; what parquet has as null counts as not there."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for record, example in zip(RECORDS, EXAMPLES, strict=True):
        with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, record)
            writer.writeheader()
            writer.writerow(record)
        assert file_examples(tmp_path / "a.csv").examples == [example]
        table = pyarrow.Table.from_pylist([{name: value or None for name, value in record.items()}])
        parquet.write_table(table, tmp_path / "a.parquet")
        assert file_examples(tmp_path / "a.parquet").examples == [example]
    long = "x" * 200_000
    assert file_examples(write(tmp_path / "a.csv", f'text\n"{long}\n"\n')).examples == [Example("", long + "\n")]


def test_folder(tmp_path):
    """Its files in order of their names; where some are named for training, only these."""
    for name in ("b.jsonl", "a.txt", "c.md", "sub/d.txt"):
        write(tmp_path / name, name if name.endswith("txt") else json.dumps({"text": name}))
    assert [example.completion for example in file_examples(tmp_path).examples] == ["a.txt", "b.jsonl"]
    write(tmp_path / "train-00000.txt", "train")
    assert [example.completion for example in file_examples(tmp_path).examples] == ["train"]
    (tmp_path / "empty" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"no file ending in .jsonl.*folders in it: {tmp_path / 'empty' / 'data'}"):
        file_examples(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="data_path='no/file' is no file or folder here"):
        file_examples("./no/file")


def test_rows_with_nothing_to_learn_are_counted(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion\na,b\nc,\nd, \n")
    found = file_examples(path)
    assert found.examples == [Example("a", "b")] and found.empty == 2
    assert "1 of prompt+completion" in str(found) and "nothing to train on: 2" in str(found)
    with pytest.raises(ValueError, match="no records to train on.*nothing to train on: 1"):
        file_examples(write(path, "prompt,completion\nc,\n"))


def test_broken_rows_can_be_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", f'{GOOD}\n{{"text": \n{{"text": 1}}\n{GOOD}\n')
    found = file_examples(path, skip_bad_rows=True)
    assert found.examples == [Example("", "x")] * 2 and found.broken == 2
    assert f"left out as broken: 2, the first: {path}, line 2: not JSON" in str(found)
    with pytest.raises(ValueError, match=f"no records to train on.*broken: 1, the first: {path}, line 1"):
        file_examples(write(path, "[]"), skip_bad_rows=True)


def test_text_paragraphs(tmp_path):
    path = write(tmp_path / "a.txt", "\n  first\nstill first\n\n \n\nsecond")
    assert [example.completion for example in file_examples(path).examples] == ["  first\nstill first", "second"]


GOOD = json.dumps({"text": "x"})


@pytest.mark.parametrize(
    "name, text, line, reason",
    [
        ("a.jsonl", f'{GOOD}\n\n{{"text": }}\n', 3, "not JSON"),
        ("a.jsonl", f"{GOOD}\n[1]\n", 2, "must be an object"),
        ("a.jsonl", f'{GOOD}\n{GOOD}\n{{"instruction": "x"}}\n', 3, "instruction+output"),
        ("a.jsonl", '{"instruction": "x", "output": null}\n', 1, "'output' must be text"),
        ("a.jsonl", '{"instruction": "x", "input": 3, "output": "y"}\n', 1, "'input' must be text"),
        ("a.jsonl", '{"messages": [{"from": "x"}]}', 1, "'messages' must be a list of objects with role and content"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', 1, "'messages' needs a chat template"),
        ("a.json", f"[\n{GOOD},\n{GOOD} 3]", 3, "not JSON"),
        ("a.json", f'[\n\n{GOOD},\n\n{{"txt":\n"x"}}]', 5, "txt"),
        ("a.json", '\n{\n"text": "x"}', 2, "not JSON"),
        ("a.json", "3", 1, "must be a list"),
        ("a.csv", "text,b\nx,y\nx\n", 2, "more or fewer fields"),
        ("a.csv", 'text\nx\n\n"y\nz', 2, "not CSV"),
        ("a.csv", "txt\nx\n", 1, "the fields ['txt'] do not make a record"),
        ("a.csv", "Question,Answer\nx,y\n", 1, "Rename 'Question' to 'question' and 'Answer' to 'answer'."),
        ("a.jsonl", '{"instruction": "x", "response": "y"}', 1, "'instruction' needs 'output' beside it and"),
        ("a.jsonl", '{"prompt": "x", "chosen": "y", "rejected": "z"}', 1, "save the better ones as completion"),
        ("a.jsonl", '{"input": {}, "preferred_output": [], "non_preferred_output": []}', 1, "DPOTrainer"),
        ("a.jsonl", '{"prompt": "x", "completion": "y", "label": false}', 1, "'label' is false, which marks"),
        ("a.jsonl", '{"instruction": "x", "output": "y", "kto_tag": false}', 1, "'kto_tag' is false"),
        ("a.csv", "question,answer,label\nx,y,False\n", 1, "'label' is false"),
        ("a.jsonl", '{"messages": [], "images": ["a.png"]}', 1, "'images' is not empty, and only text"),
    ],
)
def test_broken_rows_name_file_and_line(tmp_path, name, text, line, reason):
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError) as error:
        file_examples(path)
    place = "row" if name.endswith("csv") else "line"
    assert f"{path}, {place} {line}:" in str(error.value) and reason in str(error.value)


def test_labels_that_say_nothing_of_an_answer_are_listed_only(tmp_path):
    rows = [{"text": "x", "label": False}, {"prompt": "x", "completion": "y", "label": True, "images": "[]"}]
    found = file_examples(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert len(found.examples) == 2 and found.unused == {"label": 2}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"PAR1....", "is a parquet file; name it .parquet"),
        ("a.json", b"\x1f\x8b....", "compressed with gzip"),
        ("a.csv", "text\nx".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a.csv", b"prompt\tcompletion\na\tb\n", r"columns separated by '\\t'; save it with commas"),
        ("a.csv", b"prompt;completion\na;b\n", "columns separated by ';'"),
        ("a.json", b'{\n"data": [{"text": "x"}]}', "one object with the fields 'data'; save the list in 'data' alone"),
    ],
)
def test_what_a_file_is_instead_is_said(tmp_path, name, content, message):
    """Files that are whole, and of another kind than their names say, are not called broken."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        file_examples(path)


def test_a_list_in_a_file_of_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(RECORDS, indent=2))
    assert file_examples(path).examples == EXAMPLES


def test_broken_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="a.parquet: not a parquet file"):
        file_examples(write(tmp_path / "a.parquet", "x"))


def test_line_ends_of_other_systems(tmp_path):
    write(tmp_path / "a.csv", "").write_bytes('text\r\n"a\r\nb"\r\nc\r\n'.encode("utf-8-sig"))
    assert [example.completion for example in file_examples(tmp_path / "a.csv").examples] == ["a\r\nb", "c"]
    write(tmp_path / "a.txt", "").write_bytes(b"a\r\nb\r\n\r\nc\r\n")
    assert [example.completion for example in file_examples(tmp_path / "a.txt").examples] == ["a\r\nb", "c"]


def test_a_line_that_is_not_utf8_can_be_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\n" + GOOD.encode())
    found = file_examples(path, skip_bad_rows=True)
    assert len(found.examples) == 2 and found.first_broken == f"{path}, line 2: not UTF-8 text."


def test_text_that_is_not_utf8_names_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        file_examples(path)


@pytest.mark.parametrize("name, reason", [("a.xml", ".jsonl, .json, .csv"), ("a.jsonl", "no records")])
def test_unusable_files(tmp_path, name, reason):
    with pytest.raises(ValueError, match=reason):
        file_examples(write(tmp_path / name, "\n"))


def test_split_keeps_copies_together_and_order():
    examples = [Example("", str(i % 10)) for i in range(30)]
    train, held_out = split(examples, 3)
    assert len(held_out) == 3 and len(train) == 21 and not set(train) & set(held_out)
    assert train == [example for example in examples if example not in held_out]
    assert split(examples, 3) == (train, held_out)
    assert split(examples, 0) == (examples, [])
    with pytest.raises(ValueError, match="val_set_size=10 .* 10 different"):
        split(examples, 10)


# ---- conversations


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# as templates of reasoning models: only the last answer is shown with a thought in front
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [
    ("system", "Be brief."),
    ("user", "a?"),
    ("assistant", "b"),
    ("user", "c?"),
    ("assistant", "d"),
    ("user", "?"),
]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


@pytest.fixture
def chat(tiny_model, tmp_path):
    """What messages become with a template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def make(template: str, *conversations: list[dict]) -> tuple:
        tokenizer.chat_template = template
        path = write(tmp_path / "chat.jsonl", "\n".join(json.dumps({"messages": m}) for m in conversations))
        return tokenizer, file_examples(path, tokenizer)

    return make


def test_only_the_assistants_turns_carry_loss(chat):
    tokenizer, found = chat(CHATML, MESSAGES)
    (row,) = encode(tokenizer, found.examples, 100)
    assert row["input_ids"] == tokenizer.apply_chat_template(MESSAGES[:5], return_dict=False)
    assert marked(tokenizer, row) == (
        "<system>Be brief.<end>\n<user>a?<end>\n<assistant>>>>b<end>\n<<<<user>c?<end>\n<assistant>>>>d<end>\n<<<"
    )
    assert found.kinds == {"messages": 1} and found.empty == 0


def test_template_that_changes_earlier_turns(chat):
    """Every answer is learnt as the model will write it: last, after what came before it."""
    tokenizer, found = chat(THINKING, MESSAGES)
    rows = encode(tokenizer, found.examples, 100)
    assert [marked(tokenizer, row) for row in rows] == [
        "<system>Be brief.<end><user>a?<end><assistant>>>><think></think>b<end><<<",
        "<system>Be brief.<end><user>a?<end><assistant>b<end><user>c?<end><assistant>>>><think></think>d<end><<<",
    ]
    assert len(found.examples) == 1, "both rows of a conversation are on one side of a split"


def test_conversations_without_answer_are_counted(chat):
    _, found = chat(CHATML, MESSAGES, MESSAGES[:2], [*MESSAGES[:2], {"role": "assistant", "content": " "}])
    assert len(found.examples) == 1 and found.empty == 2 and isinstance(found.examples[0], Chat)


def test_null_in_a_message_is_a_field_that_it_has_not(chat):
    """As parquet has it, where other messages have that field; a call of a tool needs no content."""
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.name is defined %}{{ m.name }}{% endif %}")
    template = template.replace("<end>", "{% for c in m.tool_calls %}{{ c.function.name }}(){% endfor %}<end>")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tokenizer, found = chat(template, [{**MESSAGES[1], "name": None}, call])
    assert marked(tokenizer, encode(tokenizer, found.examples, 100)[0]) == "<user>a?<end>\n<assistant>>>>f()<end>\n<<<"


def test_what_the_template_refuses_names_file_and_line(chat):
    with pytest.raises(ValueError, match="chat.jsonl, line 1: field 'messages': .* does not take it: no system"):
        chat("{{ raise_exception('no system') }}", MESSAGES)


def test_prompt_and_completion_of_messages(chat, tmp_path):
    """Of the assistant's turns, those in the completion are learnt."""
    tokenizer, _ = chat(CHATML, MESSAGES)
    record = {"prompt": MESSAGES[:4], "completion": MESSAGES[4:5]}
    found = file_examples(write(tmp_path / "a.jsonl", json.dumps(record)), tokenizer)
    (row,) = encode(tokenizer, found.examples, 100)
    assert marked(tokenizer, row) == (
        "<system>Be brief.<end>\n<user>a?<end>\n<assistant>b<end>\n<user>c?<end>\n<assistant>>>>d<end>\n<<<"
    )
    assert found.kinds == {"prompt+completion": 1}
    with pytest.raises(ValueError, match="line 1: field 'prompt' must be text"):
        file_examples(write(tmp_path / "a.jsonl", json.dumps(record | {"completion": "d"})), tokenizer)


def test_sharegpt(chat, tmp_path):
    """Names of who speaks become roles, tools among them; messages under that name are taken as they are."""
    tokenizer, found = chat(CHATML, [*MESSAGES[:2], {"role": "tool", "content": "7"}, *MESSAGES[2:5]])
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns = [{"from": names[role], "value": content} for role, content in TURNS[:2]]
    turns += [{"from": "observation", "value": "7"}]
    turns += [{"from": names[role], "value": content} for role, content in TURNS[2:5]]
    for record in (turns, [*MESSAGES[:2], {"role": "tool", "content": "7"}, *MESSAGES[2:5]]):
        path = write(tmp_path / "a.jsonl", json.dumps({"conversations": record, "id": "ignored"}))
        assert file_examples(path, tokenizer).examples == found.examples
    assert "<tool>7<end>" in marked(tokenizer, encode(tokenizer, found.examples, 200)[0])
    for turn, message in (
        ({"from": "bot", "value": "x"}, "from='bot' is not known; known: system, human"),
        ({"from": "gpt"}, "'conversations' must be a list of objects"),
    ):
        path = write(tmp_path / "a.jsonl", json.dumps({"conversations": [turn]}))
        with pytest.raises(ValueError, match=f"line 1: field {message}|line 1: field 'conversations': {message}"):
            file_examples(path, tokenizer)


# ---- tokens


def test_only_the_answer_and_the_end_carry_loss(tokenizer):
    ((row),) = encode(tokenizer, [Example("def add(a, b):\n", "    return a + b")], 100)
    learnt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == "    return a + b<end>"
    assert tokenizer.decode(row["input_ids"]) == "def add(a, b):\n    return a + b<end>"
    assert row["labels"][: -len(learnt)] == [IGNORED] * len(prompt_ids(tokenizer, "def add(a, b):\n"))
    assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_inputs_are_learnt_on_request(tokenizer):
    examples = [Example("abc", "d"), Chat(((("x", False), ("y", True)),))]
    rows = encode(tokenizer, examples, 100, train_on_inputs=True)
    assert [row["labels"][1:] for row in rows] == [row["input_ids"][1:] for row in rows]
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcd<end>", "xy"]
    assert [row["labels"][0] for row in rows] == [IGNORED] * 2, "nothing predicts a first token"


def test_long_pieces_are_shown_shortened(tokenizer):
    (row,) = encode(tokenizer, [Example("a" * 5000, "b")], 10_000)
    shown = marked(tokenizer, row)
    assert shown.endswith("a>>>b<end><<<") and " [...] " in shown and len(shown) < 1600


def test_long_examples_are_cut_and_those_without_answer_left_out(tokenizer):
    prompt = len(prompt_ids(tokenizer, "xyzxyz"))
    examples = [Example("xyzxyz", "a" * 50), Example("xyzxyz" * 2, "lost"), Example("", "abc")]
    rows = encode(tokenizer, examples, prompt + 2)
    assert [len(row["input_ids"]) for row in rows] == [prompt + 2, 4]
    assert tokenizer.eos_token_id not in rows[0]["labels"]
    assert encode(tokenizer, examples[:1], prompt) == []


def test_begin_token_only_where_the_tokenizer_sets_one(tokenizer, tiny_model):
    assert prompt_ids(tokenizer, "") == []
    from tokenizers.processors import TemplateProcessing

    other = AutoTokenizer.from_pretrained(tiny_model, bos_token="<begin>")
    begin, end = other.bos_token_id, other.eos_token_id
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", begin), ("<end>", end)]
    )
    assert other("a").input_ids[0] == begin and other("a").input_ids[-1] == end
    assert prompt_ids(other, "a") == [begin, *other("a", add_special_tokens=False).input_ids]
    (row,) = encode(other, [Example("", "a")], 10)
    assert row["input_ids"].count(end) == 1 and row["labels"][0] == IGNORED
