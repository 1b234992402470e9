"""Read, hold out, tokenise, cut and count the examples that a run trains and measures its loss on."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ..arguments import HELD_OUT, FinetuneArguments
from ..models import OTHER_TOKENIZER
from .conversations import Chat
from .examples import Found, split
from .layouts import Example
from .sources import Source
from .stdlib import stdlib_examples
from .tokens import Row, encode_example, end_token, has_answer

SHUFFLED = 1000  # examples of a stream among which the next one is drawn


@dataclass
class Corpus:
    """Tokenised examples.

    Attributes:
        train: rows of `input_ids` and `labels`: a `datasets.Dataset`, or for a stream an `IterableDataset` of
            unknown length.
        held_out: the rows that are held out, never packed.
        first: one of the rows of `train`, before packing.
        vocabulary: number of tokens that the model has embeddings for; None where that is not known.
        left_out: number of training examples whose prompts leave no room for an answer; of a stream's last pass.
        lengths: number of tokens -> number of training texts that have it before the cut; of a stream's last pass.
        unknown: training texts with characters that the tokenizer has no token for; of a stream's last pass.
        ends: special token -> how many of the texts that keep their end end in it; None counts those that end in none.
    """

    train: Any
    held_out: list[Row]
    first: Row
    vocabulary: int | None = None
    left_out: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    unknown: int = 0
    ends: Counter[int | None] = field(default_factory=Counter)

    def counts(self) -> dict[str, int | None]:
        """Count the examples; for a stream, `train` is None."""
        train = len(self.train) if isinstance(self.train, datasets.Dataset) else None
        return {"train": train, "held_out": len(self.held_out), "left_out": self.left_out}

    def cut(self, length: int) -> dict[str, int]:
        """Count the texts longer than `length` tokens, and the tokens that they lose of all tokens."""
        longer = {tokens: count for tokens, count in self.lengths.items() if tokens > length}
        lost = sum((tokens - length) * count for tokens, count in longer.items())
        return {"examples": sum(longer.values()), "tokens": lost, "of_tokens": self.tokens}

    @property
    def tokens(self) -> int:
        """Count the tokens of all training texts, before they are cut."""
        return sum(tokens * count for tokens, count in self.lengths.items())

    def digest(self) -> str:
        """Return a fingerprint of the data, and of how they were cut and held out."""
        lengths = sorted(self.lengths.items()) if isinstance(self.train, datasets.Dataset) else None
        return sha256(json.dumps([self.first, self.held_out, lengths, self.counts()["train"]]).encode()).hexdigest()

    def length_of(self, share: float) -> int:
        """Return the length in tokens that this share of the texts does not exceed; 0 if there are no texts."""
        wanted, seen = share * self.lengths.total(), 0
        for tokens in sorted(self.lengths):
            seen += self.lengths[tokens]
            if seen >= wanted:
                return tokens
        return 0

    def whole(self, most: int | None) -> str:
        """Say which `max_seq_length` would keep 99% of the texts, or that a model of `most` tokens cannot."""
        wanted = self.length_of(0.99)
        if most and wanted > most:
            return f"99% of the texts whole would need {wanted}, and the model takes {most}"
        return f"--max_seq_length {wanted} keeps 99% of the texts whole"


def load_corpus(args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> Corpus:
    """Read the data that the arguments name, and print what was found.

    Args:
        args: of the run.
        tokenizer: of its base model.
        vocabulary: number of tokens that the model has embeddings for; None where that is not known.

    Raises:
        ValueError: if there is nothing to train on, a row is broken, or it has a token that the model does not embed.
        OSError: if a source cannot be read.
    """
    train, held_out = find(args)
    examples = None
    if held_out is not None:
        # stops at `val_set_size` examples; None reads all of them
        rows = (example for found in held_out for example in found.read(tokenizer, args.skip_bad_rows))
        examples = list(islice(rows, args.val_set_size))
        for found in held_out:
            print(f"held-out data: {found}")
    corpus = (stream if args.streaming else in_memory)(args, tokenizer, train, examples, vocabulary)
    if not corpus.first or (args.holds_out and not corpus.held_out):
        raise ValueError(f"max_seq_length={args.length} has no room for any prompt with an answer.")
    if corpus.unknown:
        print(
            f"unknown: {corpus.unknown} of {corpus.lengths.total()} texts have characters that the tokenizer has no "
            f"token for, so the model gets {tokenizer.unk_token!r} in their place"
        )
    return corpus


def find(args: FinetuneArguments) -> tuple[list[Found] | None, list[Found] | None]:
    """Return the sources to train on and those to hold out.

    The first are None for the standard library; the second are None if examples are held out of the training data.

    Raises:
        ValueError: if they overlap.
    """

    def found(path: str, split: str | None, preferred: str = "train", **options: Any) -> Found:
        return Found(Source(path, split, preferred, **options), args.trainer.get("dataset_text_field", "text"))

    options = {"config": args.dataset_config, "streaming": args.streaming}
    train = [found(path, args.train_split, **options) for path in args.data_paths] or None
    if (args.eval_data_path is None and args.eval_split is None) or not args.holds_out:
        return train, None
    if args.eval_data_path is None:
        held_out = [found(path, args.eval_split, **options) for path in args.data_paths]
    else:
        held_out = [found(args.eval_data_path, args.eval_split, "test")]
    for one in train or ():
        for other in held_out:
            both = {file.resolve() for file in one.source.files} & {file.resolve() for file in other.source.files}
            if both or str(one.source) == str(other.source):
                raise ValueError(
                    f"held out is also trained on: {', '.join(map(str, sorted(both))) or one.source}; give other "
                    "train_split, eval_split or eval_data_path, or none of them and val_set_size."
                )
    return train, held_out


def in_memory(
    args: FinetuneArguments,
    tokenizer: PreTrainedTokenizerBase,
    found: list[Found] | None,
    held_out: list[Example | Chat] | None,
    vocabulary: int | None,
) -> Corpus:
    """Tokenise all examples at once, and hold out `val_set_size` of them, or modules of the standard library."""
    wanted = args.val_set_size
    if held_out is None and wanted is None:
        wanted = HELD_OUT
    if found is None:
        examples, of_library = stdlib_examples()
        sources, held_out = [examples], of_library if held_out is None else held_out
    else:
        sources = []
        for one in found:
            sources.append(list(one.read(tokenizer, args.skip_bad_rows)))
            print(f"data: {one}")
        if held_out is None:
            everything = [example for examples in sources for example in examples]
            if args.val_set_size is None:  # of few rows not nearly all
                wanted = max(1, min(HELD_OUT, len(set(everything)) // 4))
            _, held_out = split(everything, wanted)
            left_out = set(held_out)
            sources = [[example for example in examples if example not in left_out] for examples in sources]
    corpus = Corpus(None, list(islice(held_out_rows(args, tokenizer, held_out, vocabulary), wanted)), {}, vocabulary)
    rows = [list(tokenised(args, tokenizer, examples, corpus)) for examples in sources]
    corpus.first = next((row for one in rows for row in one), {})
    if corpus.first:
        corpus.train = mixed(args, [datasets.Dataset.from_list(learnable(one)) for one in rows if one])
    return corpus


def stream(
    args: FinetuneArguments,
    tokenizer: PreTrainedTokenizerBase,
    found: list[Found],
    held_out: list[Example | Chat] | None,
    vocabulary: int | None,
) -> Corpus:
    """Read the examples while training, again at each pass; the first different examples are held out."""
    if held_out is None:
        examples = (example for one in found for example in one.read(tokenizer, args.skip_bad_rows))
        held_out = first_different(examples, HELD_OUT if args.val_set_size is None else args.val_set_size)
    left_out = set(held_out)
    corpus = Corpus(None, list(held_out_rows(args, tokenizer, held_out, vocabulary)), {}, vocabulary)

    def rows(one: Found) -> Iterator[Row]:
        if one is found[0]:
            corpus.left_out, corpus.unknown, corpus.lengths = 0, 0, Counter()  # a new pass
        examples = one.read(tokenizer, args.skip_bad_rows)
        yield from learnable(
            tokenised(args, tokenizer, (example for example in examples if example not in left_out), corpus)
        )

    corpus.first = next((row for one in found for row in rows(one)), {})
    streams = [datasets.IterableDataset.from_generator(partial(rows, one)) for one in found]
    corpus.train = mixed(args, streams).shuffle(args.seed, buffer_size=SHUFFLED)
    for one in found:
        print(f"data: {one.source}, read while training")
    return corpus


def mixed(args: FinetuneArguments, sources: list[Any]) -> Any:
    """Concatenate the data sets, or, with `data_weights`, draw from them in these proportions until all are read."""
    if len(sources) == 1:
        return sources[0]
    if args.data_weights is None:
        return datasets.concatenate_datasets(sources)
    shares = [weight / sum(args.data_weights) for weight in args.data_weights]
    return datasets.interleave_datasets(sources, shares, seed=args.seed, stopping_strategy="all_exhausted")


def learnable(rows: Iterable[Row]) -> list[Row] | Iterator[Row]:
    """Drop the rows' attention masks, which the collator makes again."""
    kept = ({"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows)
    return list(kept) if isinstance(rows, list) else kept


def held_out_rows(
    args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, examples: list[Example | Chat], vocabulary: int | None
) -> Iterator[Row]:
    return tokenised(args, tokenizer, examples, Corpus(None, [], {}, vocabulary))


def first_different(examples: Iterator[Example | Chat], count: int) -> list[Example | Chat]:
    different: dict[Example | Chat, None] = {}
    while len(different) < count and (example := next(examples, None)) is not None:
        different[example] = None
    return list(different)


def tokenised(
    args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example | Chat], corpus: Corpus
) -> Iterator[Row]:
    """Yield rows of tokens one by one, and count lengths and examples that give no row in `corpus`."""
    length = None if args.splits_long_texts else args.length
    # some tokenizers give their end token as the unknown one, too
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    for example in examples:
        rows = encode_example(tokenizer, example, length, args.train_on_inputs, args.truncation_mode)
        kept = [row for row, _ in rows if has_answer(row)]
        for row in kept:
            check_row(tokenizer, row, corpus.vocabulary)
        corpus.lengths.update(tokens for _, tokens in rows)
        keeps_end = args.truncation_mode == "keep_end"
        whole = (row for row, tokens in rows if keeps_end or len(row["input_ids"]) == tokens)
        corpus.ends.update(end_token(tokenizer, row) for row in whole)
        corpus.left_out += not kept
        corpus.unknown += sum(not unknown.isdisjoint(row["input_ids"]) for row in kept)
        yield from kept


def check_row(tokenizer: PreTrainedTokenizerBase, row: Row, vocabulary: int | None) -> None:
    """Raise ValueError if a row has a token that the model has no embedding for."""
    highest = max(row["input_ids"])
    if vocabulary is not None and highest >= vocabulary:
        raise ValueError(
            f"the model has embeddings for {vocabulary} tokens, and its tokenizer makes "
            f"{tokenizer.decode([highest])!r} in the data token {highest}. {OTHER_TOKENIZER}"
        )
