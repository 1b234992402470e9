"""Tasks of the quality benchmark as arrays of tokens, made once and carried to the machine that trains.

A task is one .npz file: `train_tokens` and `test_tokens` uint16 `[rows, length]`, `train_mask` and `test_mask` bool of
the same shapes, true where a token counts in the loss, and `name`. A multiple-choice task has a test row for every
candidate answer, with `test_question` int32 `[rows]` and `test_right` bool `[rows]`.
"""

import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

Encode = Callable[[str], list[int]]


@dataclass
class Task:
    name: str
    train_tokens: np.ndarray
    train_mask: np.ndarray
    test_tokens: np.ndarray
    test_mask: np.ndarray
    test_question: np.ndarray | None = None
    test_right: np.ndarray | None = None

    def save(self, path: Path) -> None:
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})

    @classmethod
    def load(cls, path: Path) -> "Task":
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files} | {"name": str(arrays["name"])})

    def describe(self) -> str:
        answers = "" if self.test_question is None else f", {len(set(self.test_question.tolist()))} test questions"
        return (
            f"{self.name}: {len(self.train_tokens)} train and {len(self.test_tokens)} test rows of "
            f"{self.train_tokens.shape[1]} tokens, {self.train_mask[:, 1:].sum()} and {self.test_mask[:, 1:].sum()} "
            f"of them in the loss{answers}"
        )


def fewer_rows(task: Task, rows: int) -> Task:
    """The same test with so many of the training rows, drawn by a fixed seed; named "name-rows".

    A run of as many steps as on the whole task then sees each of them more often: the effect of the amount of data.
    """
    if not 0 < rows < len(task.train_tokens):
        raise ValueError(
            f"--train_rows {rows} is no part of the {len(task.train_tokens)} training rows of {task.name}."
        )
    kept = np.sort(np.random.default_rng(0).permutation(len(task.train_tokens))[:rows])
    names = {
        "name": f"{task.name}-{rows}",
        "train_tokens": task.train_tokens[kept],
        "train_mask": task.train_mask[kept],
    }
    return replace(task, **names)


# Text by package


def files_by_package(folders: list[Path], suffixes: tuple[str, ...] = (".py",)) -> dict[str, list[Path]]:
    """Files by package, the first part of their path below one of the folders; no tests, no vendored copies."""
    packages: dict[str, list[Path]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--data {str(folder)!r} is no folder of packages.")
        for path in sorted(p for p in folder.rglob("*") if p.name.endswith(suffixes) and p.is_file()):
            parts = path.relative_to(folder).parts
            excluded = {"_vendor", "site-packages", "test", "tests", "idlelib", "lib2to3"}.intersection(parts[:-1])
            if not excluded and not parts[0].startswith("."):
                packages.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return packages


def held_out(package: str, one_in: int = 8) -> bool:
    """Whether a package is for the test, by its name alone, so that every machine splits alike."""
    return int(hashlib.sha256(package.encode()).hexdigest(), 16) % one_in == 0


def text_task(
    name: str,
    folders: list[Path],
    encode: Encode,
    end: int,
    length: int,
    train_rows: int,
    test_rows: int,
    per_package: int,
    suffixes: tuple[str, ...] = (".py",),
    longest: int = 20_000,
) -> Task:
    """Text held out by package: rows of it in order, at most `per_package` from one package.

    Args:
        name: of the task.
        folders: whose subfolders and modules are the packages; the standard library and site-packages, say.
        encode: text to token ids below 65536.
        end: the id between two files.
        length: tokens a row; one more than the model sees, since targets are shifted.
        suffixes: of the files.
        longest: characters of a file that are read.
    """
    rows: dict[bool, list[list[int]]] = {True: [], False: []}
    wanted = {True: test_rows, False: train_rows}
    # in the order of a hash: the alphabet would fill the rows with the first packages
    for package, files in sorted(
        files_by_package(folders, suffixes).items(), key=lambda item: hashlib.md5(item[0].encode()).digest()
    ):
        test = held_out(package)
        limit = max(per_package // 25, 1) if test else per_package  # the test is small: of many packages a little
        if len(rows[test]) < wanted[test]:
            rows[test] += _rows_of(files, encode, end, length, limit, longest)
    for test, count in wanted.items():
        if len(rows[test]) < count:
            raise ValueError(
                f"the {', '.join(suffixes)} files under {[str(f) for f in folders]} give {len(rows[test])} rows of "
                f"{length} tokens for the {'test' if test else 'training'}, fewer than {count}; add folders with "
                "--data, raise --per_package, or ask for fewer."
            )
    train, test_ = (np.array(rows[test][: wanted[test]], dtype=np.uint16) for test in (False, True))
    return Task(name, train, np.ones(train.shape, bool), test_, np.ones(test_.shape, bool))


def _rows_of(files: list[Path], encode: Encode, end: int, length: int, limit: int, longest: int) -> list[list[int]]:
    stream: list[int] = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        stream += encode(text[:longest]) + [end]  # of generated tables the beginning is enough
        if len(stream) >= limit * length:
            break
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)][:limit]


def default_folders() -> list[Path]:
    """The standard library, and where packages are installed."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


# Questions with answers


def gsm8k_task(train: Path, test: Path, encode: Encode, end: int, length: int) -> Task:
    """Grade-school maths; the loss counts the answer's tokens, reasoning and number."""

    def examples(path: Path) -> Iterator[tuple[str, str]]:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield f"Question: {record['question']}\nAnswer:", f" {record['answer']}"

    arrays = [_question_rows(list(examples(path)), encode, end, length, path)[:2] for path in (train, test)]
    return Task("gsm8k", *arrays[0], *arrays[1])


def gsm8k_number(answer: str) -> str | None:
    """The final number of an answer in GSM8K's format, without thousands separators; None if there is none."""
    found = re.search(r"####\s*(-?[\d,.]*\d)", answer)
    return found.group(1).replace(",", "") if found else None


def choice_task(train: list[Path], test: Path, encode: Encode, end: int, length: int) -> Task:
    """Multiple choice in LLM-Adapters' layout (arXiv 2304.01933): instruction, output, answer.

    The loss counts the output's tokens, "the correct answer is answer2"; the test has a row for each answer offered.
    """
    records = [record for path in train for record in json.loads(path.read_text(encoding="utf-8"))]
    pairs = [(f"{record['instruction']}\n", record["output"]) for record in records]
    train_tokens, train_mask, _ = _question_rows(pairs, encode, end, length, train[0])
    pairs, questions, right = [], [], []
    for number, record in enumerate(json.loads(test.read_text(encoding="utf-8"))):
        offered = re.search(r"Answer format:\s*(\S+)", record["instruction"])
        if not offered or record["answer"] not in offered.group(1).split("/"):
            raise ValueError(
                f"{str(test)!r}, record {number}: answer={record['answer']!r} is not one of those offered."
            )
        for answer in offered.group(1).split("/"):
            pairs.append((f"{record['instruction']}\n", record["output"].replace(record["answer"], answer)))
            questions.append(number)
            right.append(answer == record["answer"])
    test_tokens, test_mask, kept = _question_rows(pairs, encode, end, length, test)
    question, is_right = np.array(questions, np.int32)[kept], np.array(right)[kept]
    return Task("choice", train_tokens, train_mask, test_tokens, test_mask, question, is_right)


def _question_rows(
    pairs: list[tuple[str, str]], encode: Encode, end: int, length: int, source: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and mask of (prompt, answer) pairs, filled up with `end`, and which pairs were kept: those that fit."""
    tokens, mask, kept = [], [], []
    for number, (prompt, answer) in enumerate(pairs):
        question, reply = encode(prompt), encode(answer) + [end]
        if len(question) + len(reply) <= length:
            filling = length - len(question) - len(reply)
            tokens.append(question + reply + [end] * filling)
            mask.append([False] * len(question) + [True] * len(reply) + [False] * filling)
            kept.append(number)
    if len(kept) < len(pairs):
        warnings.warn(
            f"{source}: left out {len(pairs) - len(kept)} of {len(pairs)} rows over {length} tokens.", stacklevel=2
        )
    return np.array(tokens, dtype=np.uint16), np.array(mask), np.array(kept)
