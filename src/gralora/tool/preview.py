"""`gralora data`: what files of training data become, before anything is trained: layouts, lengths, what is learnt."""

import argparse
import os
import sys
from itertools import islice
from typing import Any

from . import output, parsers
from .arguments import LENGTH, FinetuneArguments
from .data.corpus import Corpus, load_corpus
from .data.tokens import COLOURS, LEARNT, marked
from .models import load_config, load_tokenizer, positions, vocabulary_size
from .side_by_side import tokenizer_of
from .training.start import continued
from .training.stopping import learnt_ends

QUANTILES = (0.5, 0.9, 0.99, 1.0)


def main(argv: list[str]) -> None:
    """The command `gralora data`."""
    args = parsers.data().parse_args(argv)
    if args.rows < 0:
        raise ValueError(f"rows={args.rows} must be at least 0.")
    output.run(lambda: preview(args), args.quiet, args.json)


def preview(args: argparse.Namespace) -> dict[str, Any]:
    """Print what the data become, and return the counts."""
    asked = FinetuneArguments(
        base_model=args.base_model,
        data_path=args.data_path,
        train_split=args.train_split,
        max_seq_length=args.max_seq_length,
        train_on_inputs=args.train_on_inputs,
        skip_bad_rows=args.skip_bad_rows,
        val_set_size=0,
        trainer={"truncation_mode": args.truncation_mode},
    )
    asked, trained = continued(asked)
    source = tokenizer_of([str(trained)] if trained else [], asked.base_model)
    tokenizer, config = load_tokenizer(source, args.chat_template_path), load_config(asked.base_model)
    most = positions(config)
    asked.max_seq_length = asked.max_seq_length or min(LENGTH, most or LENGTH)
    corpus = load_corpus(asked, tokenizer, vocabulary_size(config))
    in_colour = args.color == "always" or (
        args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    for number, row in enumerate(islice(corpus.train, args.rows), start=1):
        print(f"---- text {number}, {len(row['input_ids'])} tokens")
        print(marked(tokenizer, row, COLOURS if in_colour else LEARNT))
    print("----")
    ends = learnt_ends(corpus, tokenizer)
    counts = {
        "texts": corpus.lengths.total(),
        "tokens": corpus.tokens,
        "learnt_tokens": sum(label != -100 for row in corpus.train for label in row["labels"]),
        "lengths": {f"{share:.0%}": corpus.length_of(share) for share in QUANTILES},
        "left_out": corpus.left_out,
        "max_seq_length": asked.length,
        "cut": corpus.cut(asked.length),
        "ends": tokenizer.convert_ids_to_tokens(ends),
    }
    print(summary(counts, corpus, most))
    return counts


def summary(counts: dict[str, Any], corpus: Corpus, most: int | None) -> str:
    lengths = ", ".join(f"{share} up to {tokens}" for share, tokens in counts["lengths"].items())
    unknown = "no special token" if corpus.ends else "not known, since all lose their end"
    lines = [
        f"{counts['texts']} texts, {counts['tokens']} tokens; after cutting, {counts['learnt_tokens']} are learnt",
        f"lengths in tokens: {lengths}",
        f"answers end with: {', '.join(map(repr, counts['ends'])) or unknown}",
    ]
    cut = counts["cut"]
    if cut["examples"]:
        lines.append(
            f"cut at {counts['max_seq_length']} tokens: {cut['examples']} texts lose {cut['tokens']} tokens; "
            f"{corpus.whole(most)}"
        )
    else:
        lines.append(f"cut at {counts['max_seq_length']} tokens: none")
    if counts["left_out"]:
        lines.append(f"left out, since the prompt leaves no room for an answer: {counts['left_out']}")
    if most and counts["lengths"]["100%"] > most >= counts["lengths"]["99%"]:
        lines.append(f"the model takes {most} tokens at most")
    return "\n".join(lines)
