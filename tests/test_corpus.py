"""What a run trains on: sources on disk and on a hub, splits, what is held out, streams."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from trl import pack_dataset

from gralora.tool.arguments import FinetuneArguments
from gralora.tool.data import corpus as module
from gralora.tool.data import readers
from gralora.tool.data.corpus import SHUFFLED, load_corpus
from gralora.tool.data.layouts import Example
from gralora.tool.data.sources import Source

datasets = pytest.importorskip("datasets")
PACKED_AT_ONCE = 1000  # the batches of `datasets`' map


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def load(tokenizer):
    """The texts to train on and held out, of some passes over the former."""

    def texts(passes: int = 1, **arguments) -> tuple[list[str], list[str]]:
        arguments = {"max_steps": 5, "max_seq_length": 50} | arguments
        found = load_corpus(
            FinetuneArguments(**{k: str(v) if k.endswith("path") else v for k, v in arguments.items()}), tokenizer
        )
        data = packed(found.train, arguments.get("max_seq_length")) if arguments.get("packing") else found.train
        rows = [one for _ in range(passes) for row in data for one in documents(row)]
        assert tokenizer.decode(found.first["input_ids"]) not in ("", None)
        return tuple(
            [tokenizer.decode(row["input_ids"]).removesuffix("<end>") for row in side]
            for side in (rows, found.held_out)
        )

    return texts


def packed(rows, length: int):
    """As the SFTTrainer packs them."""
    return pack_dataset(rows.select_columns(["input_ids", "labels"]), length)


def documents(row: dict) -> list[dict]:
    """The examples of a row, packed or not."""
    ends = list(itertools.accumulate(row.get("seq_lengths", [len(row["input_ids"])])))
    return [{"input_ids": row["input_ids"][start:end]} for start, end in itertools.pairwise([0, *ends])]


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


WORDS = [f"w{i}" for i in range(20)]


# ---- what is held out


def test_held_out_size(load, tmp_path):
    path = write(tmp_path / "a.jsonl", *WORDS)
    train, held_out = load(data_path=path, val_set_size=3)
    assert len(held_out) == 3 and sorted(train + held_out) == sorted(WORDS)
    assert load(data_path=path, val_set_size=0) == (WORDS, [])
    assert len(load(data_path=path)[1]) == 5, "a quarter, where nothing is asked for"
    with pytest.raises(ValueError, match="val_set_size=20 leaves none of 20"):
        load(data_path=path, val_set_size=20)


def test_other_data_is_held_out_whole(load, tmp_path, monkeypatch):
    path, other = write(tmp_path / "a.jsonl", *WORDS), write(tmp_path / "b.jsonl", "x", "y", "z")
    assert load(data_path=path, eval_data_path=other) == (WORDS, ["x", "y", "z"])
    assert load(data_path=path, eval_data_path=other, val_set_size=2) == (WORDS, ["x", "y"])
    assert load(data_path=path, eval_data_path=other, val_set_size=0) == (WORDS, [])
    monkeypatch.setattr(module, "stdlib_examples", lambda: ([Example("", "a")], [Example("", "b")]))
    assert load(eval_data_path=other) == (["a"], ["x", "y", "z"]), "beside the standard library too"
    assert load() == (["a"], ["b"])


def test_splits_of_a_folder(load, tmp_path):
    write(tmp_path / "d" / "train-1.jsonl", "a", "b")
    write(tmp_path / "d" / "train-2.jsonl", "c")
    write(tmp_path / "d" / "test.jsonl", "x")
    write(tmp_path / "d" / "validation.jsonl", "v")
    assert load(data_path=tmp_path / "d", eval_split="test") == (["a", "b", "c"], ["x"])
    assert load(data_path=tmp_path / "d", train_split="train-2", eval_split="val") == (["c"], ["v"])
    assert load(data_path=tmp_path / "d" / "train-2.jsonl", eval_data_path=tmp_path / "d") == (["c"], ["x"])
    with pytest.raises(ValueError, match="split 'dev': no file .* there are test.jsonl, train-1.jsonl"):
        load(data_path=tmp_path / "d", eval_split="dev")
    with pytest.raises(ValueError, match="split 'test': the file .* has no splits"):
        load(data_path=tmp_path / "d" / "test.jsonl", train_split="test")
    with pytest.raises(ValueError, match="dataset_config='en' is for data sets of the hub"):
        load(data_path=tmp_path / "d", dataset_config="en")


def test_what_is_trained_on_is_not_held_out(load, tmp_path):
    write(tmp_path / "d" / "one.jsonl", "a")
    path = write(tmp_path / "d" / "test.jsonl", "b")
    with pytest.raises(ValueError, match=f"held out is also trained on: {path}; give other train_split"):
        load(data_path=tmp_path / "d", eval_split="test")
    with pytest.raises(ValueError, match="held out is also trained on"):
        load(data_path=path, eval_data_path=path)


def test_examples_without_room_are_counted(tokenizer, tmp_path):
    rows = [
        {"prompt": "a" * 60, "completion": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "", "completion": "c"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for options in ({}, {"packing": True}):
        args = FinetuneArguments(data_path=str(tmp_path / "a.jsonl"), max_seq_length=30, val_set_size=0, **options)
        assert load_corpus(args, tokenizer).counts() == {"train": 2, "held_out": 0, "left_out": 1}


# ---- the hub


@pytest.fixture
def hub(monkeypatch):
    """A data set on the hub, `someone/words`, with two configurations and splits, and what was asked for."""
    asked = []

    def load_dataset(path, name=None, split=None, streaming=False):
        asked.append((path, name, split, streaming))
        if path != "someone/words":
            raise datasets.exceptions.DatasetNotFoundError("no such data set")
        if split not in ("train", "test"):
            raise ValueError(f'Unknown split "{split}". Should be one of [train, test].')
        found = datasets.Dataset.from_list([{"text": f"{name} {split} {i}"} for i in range(3)])
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_data_set_of_the_hub(load, hub, tmp_path):
    train, held_out = load(data_path="someone/words", dataset_config="en", eval_split="test")
    assert (train, held_out) == ([f"en train {i}" for i in range(3)], [f"en test {i}" for i in range(3)])
    assert hub == [("someone/words", "en", "train", False), ("someone/words", "en", "test", False)]
    path = write(tmp_path / "a.jsonl", "x")
    assert load(data_path=path, eval_data_path="someone/words", val_set_size=1) == (["x"], ["None test 0"])
    train, held_out = load(data_path="someone/words", streaming=True, val_set_size=1)
    assert sorted(train) == ["None train 1", "None train 2"] and held_out == ["None train 0"]
    assert hub[-1] == ("someone/words", None, "train", True)
    with pytest.raises(ValueError, match="held out is also trained on: someone/words, train"):
        load(data_path="someone/words", eval_split="train")
    with pytest.raises(OSError, match="data_path='some/one' is no file or folder here, and no data set.*no such"):
        load(data_path="some/one")
    with pytest.raises(ValueError, match="Should be one of .train, test."):
        load(data_path="someone/words", train_split="valid")
    for path in ("gone.jsonl", "./gone", "/no/where", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is no file or folder here; give a local one"):
            load(data_path=path)


def test_a_row_of_the_hub_is_named(hub, monkeypatch, load):
    broken = datasets.Dataset.from_list([{"text": "x"}, {"text": None}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: broken)
    with pytest.raises(ValueError, match="someone/words, train, row 2: field 'text' must be text"):
        load(data_path="someone/words")


def test_hub_that_is_not_reached(load, monkeypatch):
    """What HF_HUB_OFFLINE=1 sets."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"data_path='someone/words' .*HF_HUB_OFFLINE=1 allows only the cache.*Offline"):
        load(data_path="someone/words")


def test_saved_data_sets(load, tmp_path):
    one = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "several")
    assert load(data_path=tmp_path / "one", val_set_size=0) == (["a", "b"], [])
    assert load(data_path=tmp_path / "several", eval_split="test") == (["a", "b"], ["b"])
    with pytest.raises(ValueError, match=r"split 'dev': .* has the splits \['train', 'test'\]"):
        load(data_path=tmp_path / "several", eval_split="dev")
    with pytest.raises(ValueError, match="split 'test': .* was saved without splits"):
        Source(str(tmp_path / "one"), "test")


# ---- streams


@pytest.fixture
def endless(monkeypatch, tmp_path):
    """A file without end, and the number of rows that were read of it."""
    read = []

    def rows(path: Path):
        for i in itertools.count():
            read.append(i)
            yield f"line {i + 1}", {"text": f"w{i}"}

    monkeypatch.setitem(readers.READERS, ".jsonl", rows)
    return write(tmp_path / "endless.jsonl"), read


@pytest.mark.parametrize("packing", [False, True])
def test_stream_is_read_as_it_is_used(endless, tokenizer, packing):
    path, read = endless
    args = FinetuneArguments(data_path=str(path), streaming=True, max_steps=5, val_set_size=4, packing=packing)
    found = load_corpus(args, tokenizer)
    assert found.counts() == {"train": None, "held_out": 4, "left_out": 0}
    data = packed(found.train, args.length) if packing else found.train
    rows = list(itertools.islice(data, 3))
    texts = [tokenizer.decode(one["input_ids"]) for row in rows for one in documents(row)]
    assert not {f"w{i}<end>" for i in range(4)} & set(texts)
    assert len(texts) == 3 or packing
    assert not packing or all(len(row["input_ids"]) > 250 for row in rows)
    assert len(read) < SHUFFLED + 100 + packing * PACKED_AT_ONCE, "a buffer to draw from, and what is packed at a time"


@pytest.mark.parametrize("packing", [False, True])
def test_stream_has_every_example_in_each_pass(load, tmp_path, packing, monkeypatch):
    """Mixed, and the same again with the same seed; copies of what is held out are left out."""
    path = write(tmp_path / "a.jsonl", *WORDS, "w0")
    options = {"data_path": path, "streaming": True, "val_set_size": 2, "packing": packing, "max_seq_length": 12}
    train, held_out = load(passes=2, **options)
    assert held_out == ["w0", "w1"] and sorted(train) == sorted(WORDS[2:] * 2)
    assert train[:18] != WORDS[2:]
    assert load(passes=2, **options) == (train, held_out)
    assert load(**options | {"seed": 1})[0] != train[:18]


def test_stream_held_out_elsewhere(load, tmp_path):
    path, other = write(tmp_path / "a.jsonl", *WORDS), write(tmp_path / "b.jsonl", "x", "w3")
    train, held_out = load(data_path=path, streaming=True, eval_data_path=other)
    assert held_out == ["x", "w3"] and sorted(train) == sorted(word for word in WORDS if word != "w3")


def test_broken_row_of_a_stream_is_named(load, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n{\n" + json.dumps({"text": "b"}))
    with pytest.raises(ValueError, match="a.jsonl, line 2: not JSON"):
        load(data_path=path, streaming=True, val_set_size=0)
    assert sorted(load(data_path=path, streaming=True, val_set_size=0, skip_bad_rows=True)[0]) == ["a", "b"]
