"""What a run trains on and measures its loss on: examples from their sources, held out, tokenised, packed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..arguments import HELD_OUT, FinetuneArguments
from .examples import Chat, Example, Found, encode, split
from .packing import WINDOW, pack
from .sources import Source, import_datasets
from .stdlib import stdlib_examples

SHUFFLED = 1000  # examples of a stream among which the next one is drawn

Row = dict[str, Any]  # `input_ids`, `attention_mask` and `labels` of an example


@dataclass
class Corpus:
    """Tokenised examples.

    Attributes:
        train: rows for the Trainer: a list, or a `datasets.IterableDataset`, whose length is not known.
        held_out: examples, never packed.
        first: an example that is trained on, before packing.
        left_out: examples to train on whose prompts leave no room for an answer; of a stream, in its last pass.
    """

    train: Any
    held_out: list[Row]
    first: Row
    left_out: int = 0

    def counts(self) -> dict[str, int | None]:
        """How many examples there are; of a stream, `train` is None."""
        train = sum(len(row.get("documents", [row])) for row in self.train) if isinstance(self.train, list) else None
        return {"train": train, "held_out": len(self.held_out), "left_out": self.left_out}


def load_corpus(args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Read what the arguments name; what was found is printed.

    Raises:
        ValueError: if there is nothing to train on, or a row is broken.
        OSError: if a source cannot be read.
    """
    train, held_out = find(args)
    held_out_examples = None
    if held_out is not None:
        # what is read is what is wanted, or all
        held_out_examples = list(islice(held_out.read(tokenizer, args.skip_bad_rows), args.val_set_size))
        print(f"held-out data: {held_out}")
    if args.streaming:
        corpus = stream(args, tokenizer, train, held_out_examples)
    else:
        corpus = in_memory(args, tokenizer, train, held_out_examples)
    if not corpus.first or (args.holds_out and not corpus.held_out):
        raise ValueError(f"max_seq_length={args.max_seq_length} has no room for any prompt with an answer.")
    return corpus


def find(args: FinetuneArguments) -> tuple[Found | None, Found | None]:
    """The sources to train on and to hold out; None for the standard library, and for what comes out of data_path.

    Raises:
        ValueError: if they overlap.
    """
    if args.data_path is None:
        train = None
    else:
        train = Source(args.data_path, args.train_split, config=args.dataset_config, streaming=args.streaming)
    if (args.eval_data_path is None and args.eval_split is None) or not args.holds_out:
        return Found(train) if train else None, None
    if args.eval_data_path is None:
        held_out = Source(args.data_path, args.eval_split, config=args.dataset_config, streaming=args.streaming)
    else:
        held_out = Source(args.eval_data_path, args.eval_split, preferred="test")
    both = {file.resolve() for file in train.files} & {file.resolve() for file in held_out.files} if train else set()
    if both or (train and str(train) == str(held_out)):
        raise ValueError(
            f"held out is also trained on: {', '.join(map(str, sorted(both))) or train}; give other train_split, "
            "eval_split or eval_data_path, or none of them and val_set_size."
        )
    return Found(train) if train else None, Found(held_out)


def in_memory(
    args: FinetuneArguments,
    tokenizer: PreTrainedTokenizerBase,
    found: Found | None,
    held_out: list[Example | Chat] | None,
) -> Corpus:
    """All at once; `val_set_size` of a source are held out, whole modules of the standard library."""
    wanted = args.val_set_size
    if held_out is None and wanted is None:
        wanted = HELD_OUT
    if found is None:
        examples, of_library = stdlib_examples()
        held_out = of_library if held_out is None else held_out
    else:
        examples = list(found.read(tokenizer, args.skip_bad_rows))
        print(f"data: {found}")
        if held_out is None:
            examples, held_out = split(examples, wanted)
    corpus = Corpus([], encode(tokenizer, held_out, args.max_seq_length, args.train_on_inputs)[:wanted], {})
    rows = list(tokenised(args, tokenizer, examples, corpus))
    corpus.first = rows[0] if rows else {}
    corpus.train = pack(rows, args.max_seq_length) if args.packing else rows
    return corpus


def stream(
    args: FinetuneArguments,
    tokenizer: PreTrainedTokenizerBase,
    found: Found,
    held_out: list[Example | Chat] | None,
) -> Corpus:
    """Read while training, again at each pass; the first different examples are held out."""
    datasets = import_datasets(args.data_path)
    if held_out is None:
        held_out = first_different(
            found.read(tokenizer, args.skip_bad_rows), HELD_OUT if args.val_set_size is None else args.val_set_size
        )
    left_out = set(held_out)
    corpus = Corpus(None, encode(tokenizer, held_out, args.max_seq_length, args.train_on_inputs), {})

    def rows() -> Iterator[Row]:
        examples = found.read(tokenizer, args.skip_bad_rows)
        return tokenised(args, tokenizer, (example for example in examples if example not in left_out), corpus)

    def packed(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {"documents": [row["documents"] for row in pack(examples, args.max_seq_length)]}

    corpus.first = next(rows(), {})
    corpus.train = datasets.IterableDataset.from_generator(rows).shuffle(args.seed, buffer_size=SHUFFLED)
    if args.packing:
        corpus.train = corpus.train.map(packed, batched=True, batch_size=WINDOW, remove_columns=list(corpus.first))
    print(f"data: {found.source}, read while training")
    return corpus


def first_different(examples: Iterator[Example | Chat], count: int) -> list[Example | Chat]:
    different: dict[Example | Chat, None] = {}
    while len(different) < count and (example := next(examples, None)) is not None:
        different[example] = None
    return list(different)


def tokenised(
    args: FinetuneArguments, tokenizer: PreTrainedTokenizerBase, examples: Iterable[Example | Chat], corpus: Corpus
) -> Iterator[Row]:
    """Rows of tokens, one after the other; examples that give none are counted in `corpus.left_out`."""
    corpus.left_out = 0
    for example in examples:
        rows = encode(tokenizer, [example], args.max_seq_length, args.train_on_inputs)
        corpus.left_out += not rows
        yield from rows
