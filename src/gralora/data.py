"""Training text: records become (prompt, completion) pairs, pairs become tokens whose labels cover the answer only.

The default text is what every Python installation brings along: the functions of the standard library, where signature
and docstring are the prompt and the body is the answer. A local JSON, JSONL or text file is the alternative.
"""

import ast
import json
import random
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
HELD_OUT_SHARE = 8  # about one module in so many is held out
# tests, programs and generated tables: little in them is a function that its docstring describes
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "encodings"}


class Example(NamedTuple):
    """What the model is given and what it shall answer. An empty prompt means plain text, all of it learnt."""

    prompt: str
    completion: str


# ---- the standard library ------------------------------------------------------------------------------------------


def stdlib_examples(root: Path | None = None) -> tuple[list[Example], list[Example]]:
    """Docstring-to-body pairs from Python's own library, for training and held out.

    The split is by top-level module, by a hash of its name: the same on every machine and in every Python version.
    A body occurs once in all, compared without comments and formatting, so no held-out answer was trained on.

    Args:
        root: folder with the library's source; default: that of the running Python.

    Returns:
        Training pairs and held-out pairs, each in a fixed order that mixes the modules.

    Raises:
        ValueError: if the folder has no Python source, as in installations that ship bytecode only.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    train, held_out, seen = [], [], set()
    for path in stdlib_files(root):
        side = held_out if is_held_out(path.relative_to(root).parts[0]) else train
        for example, code in function_examples(path):
            if code not in seen:
                seen.add(code)
                side.append(example)
    if not train or not held_out:
        raise ValueError(f"no standard library source with docstrings in {str(root)!r}; give --data_path instead.")
    for side in (train, held_out):
        random.Random(0).shuffle(side)
    return train, held_out


def stdlib_files(root: Path) -> Iterator[Path]:
    """Source files of the importable standard library, sorted; site-packages and `SKIPPED_FOLDERS` left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not SKIPPED_FOLDERS.intersection(parts):
            yield path


def is_held_out(file_or_folder: str) -> bool:
    """Whether a top-level module is held out; `_x` goes with `x`, since one often implements the other."""
    name = file_or_folder.removesuffix(".py").lstrip("_")
    return int(sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def function_examples(path: Path) -> Iterator[tuple[Example, str]]:
    """One pair per function or method with a docstring and a body, and the body's normalised code.

    Functions inside functions are part of the outer answer. A file that Python cannot parse has none.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = source.splitlines()
    for node in outer_functions(tree):
        if ast.get_docstring(node) is None or all(is_placeholder(statement) for statement in node.body[1:]):
            continue
        docstring, first = node.body[:2]
        if first.lineno == docstring.end_lineno:
            continue  # `def f(): "doc"; return 1`: nowhere to cut between lines
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        if not text[0].startswith(("def ", "async def ")):
            continue  # a string with less indentation than the code: dedent found nothing to take off
        cut = docstring.end_lineno - node.lineno + 1
        prompt, completion = "\n".join(text[:cut]) + "\n", "\n".join(text[cut:]).strip("\n")
        yield Example(prompt, completion), "\n".join(ast.unparse(statement) for statement in node.body[1:])


def outer_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions below a node that are not inside another function, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        else:
            yield from outer_functions(child)


def is_placeholder(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and statement.value.value is ...
    )


# ---- a file of the user's ------------------------------------------------------------------------------------------


def instruction_example(record: dict[str, str]) -> Example:
    """An instruction, with the text it is about where there is one, answered by `output`."""
    task = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
    return Example(f"### Instruction:\n{task}\n\n### Response:\n", record["output"])


# the fields that a record must have -> how it becomes a pair; the first line that fits is taken
RECORD_KINDS: dict[tuple[str, ...], Callable[[dict[str, str]], Example]] = {
    ("instruction", "output"): instruction_example,
    ("prompt", "completion"): lambda record: Example(record["prompt"], record["completion"]),
    ("text",): lambda record: Example("", record["text"]),
}


def file_examples(path: str | Path) -> list[Example]:
    """Pairs from a `.jsonl`, `.json` (a list of records) or `.txt` file (one text per paragraph).

    A record holds the fields of one line of `RECORD_KINDS`; other fields are ignored.

    Raises:
        ValueError: for another kind of file, an empty one, or a broken row; the message has the file and the line.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    readers = {".jsonl": jsonl_rows, ".json": json_rows, ".txt": text_rows}
    if path.suffix not in readers:
        raise ValueError(f"data_path={str(path)!r} must end in one of {', '.join(readers)}.")
    examples = []
    try:
        for line, row in readers[path.suffix](path.read_text(encoding="utf-8")):
            examples.append(record_example(row, f"{path}, line {line}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}, column {error.colno}.") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text.") from error
    if not examples:
        raise ValueError(f"data_path={str(path)!r} has no records.")
    return examples


def jsonl_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(error.msg, "\n" * (number - 1) + line, number - 1 + error.pos) from None
            yield number, row


def json_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Line number and value of each element of a JSON list."""
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise json.JSONDecodeError(f"the file must be a list of records, not a {type(rows).__name__}", text, 0)
    # the text is known to be a valid list, so elements can be walked with what stands between them skipped
    decode, between, position = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*"), text.index("[") + 1
    for row in rows:
        position = between.match(text, position).end()
        yield text.count("\n", 0, position) + 1, row
        _, position = decode(text, position)


def text_rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and record of each paragraph; blank lines separate them."""
    for match in re.finditer(r"(?:[^\n]*\S[^\n]*(?:\n|$))+", text):
        yield text.count("\n", 0, match.start()) + 1, {"text": match.group().rstrip("\n")}


def record_example(record: Any, where: str) -> Example:
    """The pair that a record stands for; `where` opens the message of a ValueError if it stands for none."""
    kinds = " or ".join("+".join(kind) for kind in RECORD_KINDS)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record must be an object with the fields {kinds}, got {record!r:.80}.")
    kind = next((kind for kind in RECORD_KINDS if all(name in record for name in kind)), None)
    if kind is None:
        raise ValueError(f"{where}: the fields {sorted(record)} do not make a record; it needs {kinds}.")
    for name in (*kind, "input"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"{where}: field {name!r} must be text, got {record[name]!r:.80}.")
    example = RECORD_KINDS[kind](record)
    if not example.completion.strip():
        raise ValueError(f"{where}: field {kind[-1]!r} is empty, so there is nothing to learn.")
    return example


def split(examples: list[Example], held_out_size: int) -> tuple[list[Example], list[Example]]:
    """Take `held_out_size` different examples out, at random but always the same; copies of a row go together.

    Raises:
        ValueError: if no example would be left for training.
    """
    unique = list(dict.fromkeys(examples))
    if held_out_size >= len(unique):
        raise ValueError(f"val_set_size={held_out_size} leaves none of {len(unique)} different records to train on.")
    random.Random(0).shuffle(unique)
    held_out = unique[:held_out_size]
    return [example for example in examples if example not in set(held_out)], held_out


# ---- tokens --------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with the beginning-of-text token where the tokenizer sets one, never an end token."""
    special = tokenizer("").input_ids
    start = special[:1] if special[:1] == [tokenizer.bos_token_id] else []
    return start + tokenizer(prompt, add_special_tokens=False).input_ids


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example], max_seq_length: int
) -> list[dict[str, list[int]]]:
    """Tokens of each pair, `input_ids`, `attention_mask` and `labels` of one length, ending in the end token.

    Labels of the prompt are `IGNORED`. What is longer than `max_seq_length` tokens is cut, and then has no end token;
    an example whose prompt leaves no room for an answer is left out.
    """
    rows = []
    for prompt, completion in examples:
        ids = prompt_ids(tokenizer, prompt)
        answer = tokenizer(completion, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        # a first token is never predicted, so it needs no label
        labels = ([IGNORED] * len(ids) + answer)[:max_seq_length]
        if any(label != IGNORED for label in labels[1:]):
            ids = (ids + answer)[:max_seq_length]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows
