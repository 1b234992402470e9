"""Turn examples into tokens and labels, as the model will see them when asked, and show what is learnt."""

import itertools
import os.path
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from .conversations import Chat
from .layouts import Example

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
TRUNCATION_MODES = ("keep_start", "keep_end")  # TRL's names
LEARNT = (">>>", "<<<")  # around what is learnt
SHOWN = 1500  # characters of one piece
COLOURS = ("\033[32m", "\033[0m")  # the same on terminals

Row = dict[str, list[int]]  # `input_ids`, `attention_mask` and `labels` of one text, of one length
Pieces = Iterable[tuple[str, bool]]  # text, and whether it is learnt


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-text token if the tokenizer sets one, else nothing."""
    special = tokenizer("").input_ids
    return special[:1] if special[:1] == [tokenizer.bos_token_id] else []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return a prompt's token ids, after the beginning-of-text token if there is one, never with an end token."""
    return beginning(tokenizer) + tokenizer(prompt, add_special_tokens=False).input_ids


def piece_tokens(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """Tokenise the whole text, and tell which tokens are learnt: a token belongs to the piece in which it ends."""
    pieces = list(pieces)
    whole = "".join(piece for piece, _ in pieces)
    stops = list(itertools.accumulate(len(piece) for piece, _ in pieces))  # where each piece ends in the text
    if tokenizer.is_fast:
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = encoded.input_ids, [end for _, end in encoded.offset_mapping]
        owners = [min(bisect_left(stops, end), len(pieces) - 1) for end in ends]
    else:  # a slow tokenizer does not say where its tokens are in the text
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        heads = [tokenizer(whole[:stop], add_special_tokens=False).input_ids for stop in stops]
        cuts = [len(os.path.commonprefix([head, ids])) for head in heads]
        owners = [next((i for i, cut in enumerate(cuts) if t < cut), len(pieces) - 1) for t in range(len(ids))]
    return ids, [pieces[owner][1] for owner in owners]


def pair_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[bool]]:
    """Tokenise prompt and completion as one text, without an end token, and tell which tokens are the completion's.

    Tokens may merge across the boundary, so that the text's tokens do not begin with the prompt's. The prompt then
    keeps its own tokens, since the model will be asked with these.
    """
    whole, _ = piece_tokens(tokenizer, [(example.prompt + example.completion, True)])
    asked = tokenizer(example.prompt, add_special_tokens=False).input_ids
    if whole[: len(asked)] == asked:
        answer = whole[len(asked) :]
    else:
        # after a line break, so that SentencePiece's models put no space in front of the first word
        line = tokenizer("\n", add_special_tokens=False).input_ids
        answer = tokenizer("\n" + example.completion, add_special_tokens=False).input_ids
        if answer[: len(line)] == line:
            answer = answer[len(line) :]
        else:
            answer = tokenizer(example.completion, add_special_tokens=False).input_ids
    return asked + answer, [False] * len(asked) + [True] * len(answer)


def texts(tokenizer: PreTrainedTokenizerBase, example: Example | Chat) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the token ids of each text of an example, and which of them are learnt.

    A pair begins and ends with the tokenizer's special tokens, also if its text has them already, as text that a
    template has written does. A conversation begins and ends as its template writes it.
    """
    if isinstance(example, Example):
        rows = [pair_tokens(tokenizer, example)]
    else:
        rows = [piece_tokens(tokenizer, pieces) for pieces in example.texts]
    for ids, learnt in rows:
        if isinstance(example, Example) or example.plain:
            start, end = beginning(tokenizer), [tokenizer.eos_token_id]
            start = [] if ids[: len(start)] == start else start
            end = [] if ends_with(tokenizer, ids, tokenizer.eos_token_id) else end
            # the last turn of a history may not be learnt
            flags = [False] * len(start) + learnt + [not learnt or learnt[-1]] * len(end)
            yield [*start, *ids, *end], flags
        else:
            yield ids, learnt


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    example: Example | Chat,
    max_seq_length: int | None = None,
    train_on_inputs: bool = False,
    truncation_mode: str = "keep_start",
) -> list[tuple[Row, int]]:
    """Return the rows of an example, each with its number of tokens before it was cut; see `encode`."""
    rows, kept = [], slice(max_seq_length)
    if truncation_mode == "keep_end" and max_seq_length:
        kept = slice(-max_seq_length, None)
    for ids, learnt in texts(tokenizer, example):
        labels = [token if learn or train_on_inputs else IGNORED for token, learn in zip(ids, learnt, strict=True)]
        row = {"input_ids": ids[kept], "attention_mask": [1] * len(ids[kept]), "labels": labels[kept]}
        # the first token is never predicted, yet its label would count in the mean of the loss
        row["labels"][:1] = [IGNORED] * len(row["labels"][:1])
        rows.append((row, len(ids)))
    return rows


def ends_with(tokenizer: PreTrainedTokenizerBase, ids: list[int], end: int | None) -> bool:
    """Tell whether a token is the last one of a text; spaces after it do not count."""
    last = next((token for token in reversed(ids) if token == end or tokenizer.decode([token]).strip()), None)
    return last is not None and last == end


def end_token(tokenizer: PreTrainedTokenizerBase, row: Row) -> int | None:
    """Return the special token that ends a text's last answer, or None; spaces after it do not count."""
    ends = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for token, label in zip(reversed(row["input_ids"]), reversed(row["labels"]), strict=True):
        if token in ends:
            return token if label != IGNORED else None
        if label == IGNORED or tokenizer.decode([token]).strip():
            return None
    return None


def has_answer(row: Row) -> bool:
    return any(label != IGNORED for label in row["labels"])


def encode(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example | Chat],
    max_seq_length: int | None,
    train_on_inputs: bool = False,
    truncation_mode: str = "keep_start",
) -> list[Row]:
    """Tokenise examples into rows of `input_ids`, `attention_mask` and `labels` of one length, one row per text.

    The labels of tokens that are not learnt are `IGNORED`, unless `train_on_inputs`. A text longer than
    `max_seq_length` tokens loses its end, or its beginning with `keep_end`. It is left out if it then has nothing to
    learn.
    """
    options = (max_seq_length, train_on_inputs, truncation_mode)
    return [row for example in examples for row, _ in encode_example(tokenizer, example, *options) if has_answer(row)]


def marked(tokenizer: PreTrainedTokenizerBase, row: Row, marks: tuple[str, str] = LEARNT) -> str:
    """Decode a row, with marks around what is learnt and long pieces shortened."""
    shown = []
    tokens: Any = zip(row["input_ids"], row["labels"], strict=True)
    for learnt, piece in itertools.groupby(tokens, key=lambda token: token[1] != IGNORED):
        words = tokenizer.decode([token for token, _ in piece])
        if len(words) > SHOWN:
            words = f"{words[: SHOWN // 2]} [...] {words[-SHOWN // 2 :]}"
        shown.append(words.join(marks) if learnt else words)
    return "".join(shown)
