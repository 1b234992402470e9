"""Conversations: one rendering gives the tokens, every part of a record is in it, and every field means something."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gralora.tool import cli
from gralora.tool.data.examples import file_examples
from gralora.tool.data.layouts import Example
from gralora.tool.data.tokens import IGNORED, encode, marked, prompt_ids
from gralora.tool.generation import chat_or_plain_ids

# as the models' own templates write turns, without their checks
TEMPLATES = {
    "llama-2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
}
MESSAGES = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue is a colour."},
    {"role": "user", "content": "And another one?"},
    {"role": "assistant", "content": "Green is one."},
]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# with all that a conversation can hold
FULL = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {}}}]


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer made as Llama's is: a space in front of a text, byte fallback, no splitting at words."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    tokenizer.train_from_iterator(["Name a colour.", "Blue is a colour. Green is one.", "[INST] [/INST]"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def read(tmp_path):
    """What a file with one record becomes."""

    def read(tokenizer, record: dict, **options):
        path = Path(tmp_path, "a.jsonl")
        path.write_text(json.dumps(record))
        return file_examples(path, tokenizer, **options)

    return read


def row_of(tokenizer, found):
    (row,) = encode(tokenizer, found.examples, None)
    return row


def learnt(tokenizer, row) -> str:
    return tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED])


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_the_template(sentencepiece, read, name):
    """And not of its pieces apart, before each of which such a tokenizer puts a space."""
    sentencepiece.chat_template = TEMPLATES[name]
    row = row_of(sentencepiece, read(sentencepiece, {"messages": MESSAGES}))
    assert row["input_ids"] == sentencepiece.apply_chat_template(MESSAGES, return_dict=False)
    said = learnt(sentencepiece, row)
    assert "Blue is a colour." in said and "Green is one." in said and said.count("</s>") == 2
    assert "Name" not in said and "another" not in said and "INST" not in said and "user" not in said
    # what the model is asked with is what it was trained on, in each turn
    for turn in (1, 3):
        earlier = tuple(MESSAGES[: turn - 1])
        asked = chat_or_plain_ids(sentencepiece, MESSAGES[turn - 1]["content"], True, earlier)
        assert row["input_ids"][: len(asked)] == asked
        assert row["labels"][len(asked)] != IGNORED == row["labels"][len(asked) - 1]
    text = sentencepiece.apply_chat_template(MESSAGES, tokenize=False)
    cut = text.index("Blue")
    apart = [sentencepiece(piece, add_special_tokens=False).input_ids for piece in (text[:cut], text[cut:])]
    assert sum(apart, []) != row["input_ids"], "so that this test can fail"


@pytest.mark.parametrize("prompt", ["Name a colour.\n", "Name a colour. "])
def test_a_pair_is_tokenised_as_the_model_is_asked(sentencepiece, prompt):
    """The answer has no space in front that the prompt does not end in, and the prompt keeps its own last token."""
    row = encode(sentencepiece, [Example(prompt, "Blue is a colour.")], None)[0]
    asked = prompt_ids(sentencepiece, prompt)
    assert row["input_ids"][: len(asked)] == asked
    assert set(row["labels"][: len(asked)]) == {IGNORED}
    assert sentencepiece.decode(row["input_ids"]) == f"{prompt}Blue is a colour.</s>"
    assert row["input_ids"][-1] == sentencepiece.eos_token_id == row["labels"][-1]
    apart = sentencepiece("Blue is a colour.", add_special_tokens=False).input_ids
    assert row["input_ids"][len(asked) : -1] != apart


def test_merges_across_the_boundary_do_not_change_the_prompt(tokenizer):
    """`ad` and `d` in GPT-2's way merge to other tokens than the prompt's, which it is asked with."""
    whole = tokenizer("def add", add_special_tokens=False).input_ids
    asked = tokenizer("def a", add_special_tokens=False).input_ids
    assert whole[: len(asked)] != asked, "so that this test can fail"
    row = encode(tokenizer, [Example("def a", "dd")], None)[0]
    assert row["input_ids"][: len(asked)] == asked and tokenizer.decode(row["input_ids"]) == "def add<end>"


# ---- parts of a record


def test_arguments_and_tools_as_json_text(tokenizer, read):
    """As OpenAI's files have them; the same as objects."""
    tokenizer.chat_template = FULL
    rows = []
    for arguments, tools in ((json.dumps(CALL["function"]["arguments"]), json.dumps(TOOLS)), (None, TOOLS)):
        call = CALL if arguments is None else CALL | {"function": CALL["function"] | {"arguments": arguments}}
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        rows.append(row_of(tokenizer, read(tokenizer, {"messages": messages, "tools": tools})))
    assert rows[0] == rows[1]
    assert '>>><call>weather {"city": "Zürich", "days": 2}</call><end>' in marked(tokenizer, rows[0])
    assert "Of a city" in tokenizer.decode(rows[0]["input_ids"])


SHAREGPT = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue is a colour."}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*MESSAGES[:1], {"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS},
        {"conversations": SHAREGPT},
        {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
    ],
    ids=lambda record: "+".join(record),
)
def test_messages_as_json_text(tokenizer, read, tmp_path, record):
    """As a table has them, whose cells hold text; the same as in JSON lines, with the same checks."""
    pandas = pytest.importorskip("pandas")
    tokenizer.chat_template = FULL
    expected = read(tokenizer, record)
    table = pandas.DataFrame([{name: json.dumps(value) for name, value in record.items()}])
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "a.csv", tmp_path / "a.parquet"):
        found = file_examples(path, tokenizer)
        assert found.examples == expected.examples and found.kinds == expected.kinds
    found = read(
        tokenizer, {name: json.dumps([v | {"mood": "good"} for v in record[name]]) for name in found_in(record)}
    )
    assert found.unused == {f"{name}[].mood": 1 for name in found_in(record)}


def found_in(record: dict) -> list[str]:
    return [name for name in record if name != "tools"]


@pytest.mark.parametrize(
    "text, reason",
    [
        (str(MESSAGES), "'messages' is text that is not JSON: .* as Python prints a list, so save it with json.dumps"),
        (json.dumps(MESSAGES)[:-9], "'messages' is text that is not JSON: "),
        (json.dumps(MESSAGES[0]), "'messages' must be a list, or JSON text of one"),
        (json.dumps([{"role": "user"}]), r"messages\[0\] is "),
    ],
    ids=["Python", "cut", "one message", "a bad message"],
)
def test_text_that_is_no_messages(tokenizer, read, text, reason):
    tokenizer.chat_template = FULL
    with pytest.raises(ValueError, match="line 1: field .*" + reason):
        read(tokenizer, {"messages": text})


def test_characters_that_the_tokenizer_does_not_know_are_counted(tiny_model, tmp_path, capfd):
    """A tokenizer without bytes to fall back on writes one token for all of them."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    letters = Tokenizer(models.BPE({"<unk>": 0, "<end>": 1, "a": 2, "b": 3}, [], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<end>", unk_token="<unk>").save_pretrained(base)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "ä"}, {"prompt": "é", "completion": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["data", str(tmp_path / "a.jsonl"), f"--base_model={base}"]) == 0
    assert "unknown: 2 of 3 texts have characters that the tokenizer has no token for" in capfd.readouterr().out


def test_a_prompt_may_be_json(read):
    assert read(None, {"prompt": '[{"a": 1}]', "completion": "[1]"}).examples == [Example('[{"a": 1}]', "[1]")]


def test_other_forms_of_a_call(tokenizer, read):
    """OpenAI's older function_call, and ShareGPT's from=function_call."""
    tokenizer.chat_template = FULL
    function = CALL["function"]
    old = {"role": "assistant", "content": None, "function_call": function | {"arguments": '{"city": "Zürich"}'}}
    rows = [row_of(tokenizer, read(tokenizer, {"messages": [MESSAGES[0], old]}))]
    value = json.dumps({"name": "weather", "arguments": {"city": "Zürich"}})
    turns = [{"from": "human", "value": MESSAGES[0]["content"]}, {"from": "function_call", "value": value}]
    tokenizer.chat_template = FULL.replace("c.function.", "(c.function or c).")
    rows.append(row_of(tokenizer, read(tokenizer, {"conversations": turns})))
    for row in rows:
        assert '<call>weather {"city": "Zürich"}</call>' in learnt(tokenizer, row)


ANSWER = {"role": "assistant", "content": "Sun."}
DROPPED = {
    "a call": ({"messages": [MESSAGES[0], {**ANSWER, "tool_calls": [CALL]}]}, r"messages\[1\].tool_calls\[0\]"),
    "a thought": (
        {"messages": [MESSAGES[0], {**ANSWER, "reasoning_content": "Hm"}]},
        r"messages\[1\].reasoning_content",
    ),
    "tools": ({"messages": [MESSAGES[0], ANSWER], "tools": TOOLS}, "field 'tools': .* tool 'weather'"),
}


@pytest.mark.parametrize("what", DROPPED)
def test_what_the_template_does_not_write_is_refused_by_name(tokenizer, read, what):
    record, message = DROPPED[what]
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: {message}"):
        read(tokenizer, record)
    tokenizer.chat_template = FULL
    assert learnt(tokenizer, row_of(tokenizer, read(tokenizer, record))).endswith("<end>\n")


def test_a_message_that_the_template_drops_is_refused(tokenizer, read):
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]
    with pytest.raises(ValueError, match=r"messages\[0\].content is not in what the chat template writes: 'Be"):
        read(tokenizer, {"messages": messages})


def test_thoughts_of_earlier_turns_may_be_left_out(tokenizer, read):
    """As the templates of reasoning models do on purpose; each answer is learnt with its own."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content is defined and loop.last %}"
        "({{ m.reasoning_content }}){% endif %}{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [m | ({"reasoning_content": f"hm{i}"} if i % 2 else {}) for i, m in enumerate(MESSAGES)]
    rows = encode(tokenizer, read(tokenizer, {"messages": messages}).examples, None)
    assert [learnt(tokenizer, row) for row in rows] == ["(hm1)Blue is a colour.<end>", "(hm3)Green is one.<end>"]


def test_arguments_as_text_where_the_template_joins_them(tokenizer, read):
    """DeepSeek-V3's template adds the arguments to a text."""
    tokenizer.chat_template = FULL.replace("c.function.arguments | tojson", "'' + c.function.arguments")
    found = read(tokenizer, {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [CALL]}]})
    assert 'weather {"city": "Z' in learnt(tokenizer, row_of(tokenizer, found))


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}, r"tool_calls\[0\]: .* not JSON"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "must be an object with the function's name"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "no text: 'image_url'"),
        ({"content": "x", "weight": 0.5}, "weight=0.5 must be 0 or 1"),
    ],
)
def test_malformed_messages_are_named(tokenizer, read, message, reason):
    tokenizer.chat_template = FULL
    with pytest.raises(ValueError, match=rf"line 1: messages\[1\].*{reason}"):
        read(tokenizer, {"messages": [MESSAGES[0], {"role": "assistant", **message}]})


def test_content_in_parts(tokenizer, read):
    tokenizer.chat_template = CHATML
    parts = [{"type": "text", "text": "Blue is "}, {"type": "text", "text": "a colour."}]
    found = read(tokenizer, {"messages": [MESSAGES[0], {"role": "assistant", "content": parts}]})
    assert learnt(tokenizer, row_of(tokenizer, found)) == "Blue is a colour.<end>\n"


# ---- fields with a meaning


@pytest.mark.parametrize("field, value", [("weight", 0), ("train", False), ("loss", 0)])
def test_messages_that_are_not_to_be_learnt(tokenizer, read, field, value):
    """OpenAI's and ShareGPT's, axolotl's, ms-swift's."""
    tokenizer.chat_template = CHATML
    messages = [m | ({field: value} if i == 1 else {}) for i, m in enumerate(MESSAGES)]
    found = read(tokenizer, {"messages": messages})
    assert learnt(tokenizer, row_of(tokenizer, found)) == "Green is one.<end>\n" and not found.unused
    turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in MESSAGES]
    turns[1][field] = value
    assert learnt(tokenizer, row_of(tokenizer, read(tokenizer, {"conversations": turns}))) == "Green is one.<end>\n"
    messages[3][field] = value
    with pytest.raises(ValueError, match="nothing to train on: 1"):
        read(tokenizer, {"messages": messages})


def test_a_users_message_cannot_be_asked_for_alone(tokenizer, read):
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"messages\[0\].train=True: only the assistant's messages"):
        read(tokenizer, {"messages": [MESSAGES[0] | {"train": True}, MESSAGES[1]]})


@pytest.mark.parametrize("fields", [("instruction", "output"), ("query", "response"), ("question", "answer")])
def test_system_and_history(tokenizer, read, fields):
    """LLaMA-Factory's and ms-swift's columns, also as text in a csv; earlier answers are learnt too."""
    question, answer = fields
    record = {question: "b?", answer: "B", "system": "Be brief.", "history": [["a?", "A"]]}
    expected = (
        "Be brief.\n\n### Instruction:\na?\n\n### Response:\n>>>A<<<\n\n### Instruction:\nb?\n\n"
        "### Response:\n>>>B<end><<<"
    )
    for history in (record["history"], json.dumps(record["history"])):
        found = read(tokenizer, record | {"history": history})
        assert marked(tokenizer, row_of(tokenizer, found)) == expected and not found.unused
    assert read(tokenizer, {question: "b?", answer: "B", "history": [], "system": ""}).examples == [
        Example("### Instruction:\nb?\n\n### Response:\n", "B")
    ]
    with pytest.raises(ValueError, match=r"history\[0\] must be a list of an instruction and its answer"):
        read(tokenizer, record | {"history": [["a?"]]})


def test_system_beside_messages(tokenizer, read):
    tokenizer.chat_template = CHATML
    whole = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    expected = row_of(tokenizer, read(tokenizer, {"messages": whole}))
    assert row_of(tokenizer, read(tokenizer, {"messages": MESSAGES, "system": "Be brief."})) == expected
    with pytest.raises(ValueError, match="both the system's message"):
        read(tokenizer, {"messages": whole, "system": "Be kind."})


def test_options_of_the_template(tokenizer, read):
    """TRL's field; for thinking to be switched off, say."""
    record = {"messages": MESSAGES[:2], "chat_template_kwargs": {"quick": True}}
    tokenizer.chat_template = "{% if quick %}quick{% endif %}" + CHATML
    assert tokenizer.decode(row_of(tokenizer, read(tokenizer, record))["input_ids"]).startswith("quick<|user|>")


def test_a_speakers_name_that_the_template_does_not_write_is_named(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [MESSAGES[0] | {"name": "Bob"}, MESSAGES[1]]}))
    named = CHATML.replace("{{ m.content", "{{ m.name }}{{ m.content")
    for template, unused in ((CHATML, {"messages[].name": 1}), (named, {})):
        tokenizer.chat_template = template
        assert file_examples(path, tokenizer).unused == unused


def test_fields_without_a_meaning_are_named_once(tokenizer, tmp_path):
    tokenizer.chat_template = CHATML
    path = tmp_path / "a.jsonl"
    messages = [MESSAGES[0] | {"id": 7, "name": None}, MESSAGES[1]]
    records = [{"messages": messages, "source": "x"}, {"messages": MESSAGES, "source": "y", "score": 1, "note": None}]
    path.write_text("\n".join(map(json.dumps, records)))
    found = file_examples(path, tokenizer)
    assert found.unused == {"source": 2, "score": 1, "messages[].id": 1}
    assert "fields that are not used: messages[].id (1 row), score (1 row), source (2 rows)" in str(found)


def test_arguments_of_calls_stay_those_of_their_row(tokenizer, tmp_path):
    """Readers that give all rows one schema fill in null for what other rows have (axolotl #2909)."""
    tokenizer.chat_template = FULL
    path = tmp_path / "a.jsonl"
    calls = [("move", {"x": 1}), ("say", {"text": "hi"})]
    path.write_text(
        "\n".join(
            json.dumps(
                {
                    "messages": [
                        MESSAGES[0],
                        {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
                    ]
                }
            )
            for name, arguments in calls
        )
    )
    written = [learnt(tokenizer, row) for row in encode(tokenizer, file_examples(path, tokenizer).examples, None)]
    assert written == ['<call>move {"x": 1}</call><end>\n', '<call>say {"text": "hi"}</call><end>\n']


@pytest.mark.parametrize("form", ["parquet", "saved by datasets"])
def test_arguments_of_calls_have_no_keys_of_other_rows(tokenizer, tmp_path, form):
    """Arrow gives an object the keys that it has in any row, and null where it had none."""
    tokenizer.chat_template = FULL
    rows = []
    for name, arguments in (("move", {"x": 1, "to": {"y": 2}}), ("say", {"to": {"z": 3}, "text": "hi"})):
        properties = {key: {"type": "string"} for key in arguments}
        call = {"function": {"name": name, "arguments": arguments}}
        tools = [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}]
        rows.append({"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [call]}], "tools": tools})
    table = datasets.Dataset.from_list(rows)
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["text"] is None
    path = tmp_path / "a.parquet"
    if form == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(path)
    found = file_examples(path, tokenizer)
    rendered = [tokenizer.decode(row["input_ids"]) for row in encode(tokenizer, found.examples, None)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    own = encode(tokenizer, file_examples(path, tokenizer).examples, None)
    assert rendered == [tokenizer.decode(row["input_ids"]) for row in own]
    assert "nulls among tools or arguments, taken for keys of other rows and left out: in 2 rows" in str(found)


def test_nulls_that_a_json_file_gives_are_learnt(tokenizer, read):
    tokenizer.chat_template = FULL
    call = {"function": {"name": "move", "arguments": {"x": None}}}
    found = read(tokenizer, {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [call]}]})
    assert learnt(tokenizer, row_of(tokenizer, found)) == '<call>move {"x": null}</call><end>\n'
    assert "nulls among" not in str(found)


# ---- further layouts that people have


def test_fields_that_only_this_template_reads(tokenizer, read):
    """OLMo 3's tool data: calls as text, beside content that is null."""
    call = {"role": "assistant", "content": None, "function_calls": "get(a=1)"}
    record = {"messages": [MESSAGES[0], call, {"role": "environment", "content": "7"}, MESSAGES[1]]}
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"must be a list of objects with role and content.*messages\[1\] is "):
        read(tokenizer, record)
    tokenizer.chat_template = CHATML.replace("m.content", "(m.content + (m.function_calls or ''))")
    found = read(tokenizer, record)
    assert learnt(tokenizer, row_of(tokenizer, found)) == "get(a=1)<end>\nBlue is a colour.<end>\n"
    assert not found.unused


def test_calls_as_messages_of_their_own(tokenizer, read):
    """ms-swift's: they belong to the assistant's turn before them, and are learnt."""
    tokenizer.chat_template = FULL.replace("c.function.", "(c.function or c).")
    calls = [{"role": "tool_call", "content": json.dumps({"name": name, "arguments": {"x": 1}})} for name in "fg"]
    said = {"role": "assistant", "content": "Wait."}
    swift = read(
        tokenizer,
        {"messages": [MESSAGES[0], said, *calls, {"role": "tool_response", "content": "7"}, MESSAGES[1]]},
    )
    whole = said | {"tool_calls": [{"name": name, "arguments": {"x": 1}} for name in "fg"]}
    usual = read(tokenizer, {"messages": [MESSAGES[0], whole, {"role": "tool", "content": "7"}, MESSAGES[1]]})
    assert swift.examples == usual.examples
    assert '<call>f {"x": 1}</call><call>g {"x": 1}</call>' in learnt(tokenizer, row_of(tokenizer, swift))
    with pytest.raises(ValueError, match=r"messages\[1\]: the content of a tool_call must be JSON"):
        read(tokenizer, {"messages": [MESSAGES[0], {"role": "tool_call", "content": "f(1)"}, MESSAGES[1]]})


def test_rows_without_an_assistant_say_whose_they_are(tokenizer, read):
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"to train on: 1 \(their roles: model, user; only assistant is learnt\)"):
        read(tokenizer, {"messages": [MESSAGES[0], {"role": "model", "content": "Blue."}]})


def test_parts_of_a_message_cannot_be_learnt_apart(tokenizer, read):
    tokenizer.chat_template = CHATML
    detail = [{"begin_offset": 0, "end_offset": 3, "train": False}]
    with pytest.raises(ValueError, match=r"messages\[1\].train_detail: a message is learnt as a whole or not"):
        read(tokenizer, {"messages": [MESSAGES[0], MESSAGES[1] | {"train_detail": detail}]})


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"text": "Blue.<end>"}, "Blue.<end>"),
        ({"text": "Blue.<end>\n"}, "Blue.<end>\n"),
        ({"text": "Blue."}, "Blue.<end>"),
        ({"prompt": "A colour?", "completion": " Blue.<end>"}, "A colour? Blue.<end>"),
        ({"prompt": "A colour?<end>", "completion": " Blue."}, "A colour?<end> Blue.<end>"),
    ],
)
def test_texts_that_a_template_has_written_end_once(tokenizer, read, record, expected):
    assert tokenizer.decode(row_of(tokenizer, read(tokenizer, record))["input_ids"]) == expected


def test_texts_that_a_template_has_written_begin_once(sentencepiece, read):
    """The same text with and without the beginning token: notebooks write chats into a field `text` beforehand."""
    own = sentencepiece._tokenizer.post_processor
    sentencepiece._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    try:
        rows = [row_of(sentencepiece, read(sentencepiece, {"text": text})) for text in ("<s>Blue.", "Blue.")]
    finally:
        sentencepiece._tokenizer.post_processor = own
    assert [row["input_ids"].count(sentencepiece.bos_token_id) for row in rows] == [1, 1]


def test_prompt_and_completion_of_two_kinds(tokenizer, read):
    with pytest.raises(ValueError, match="field 'prompt' must be text, as 'completion' is, or both must be lists"):
        read(tokenizer, {"prompt": [MESSAGES[0]], "completion": "Blue."})
