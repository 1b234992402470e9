"""Loss and perplexity on held-out answers, as `gralora finetune` reports its held-out loss."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.examples import file_examples, split
from ..data.stdlib import stdlib_examples
from ..data.tokens import encode
from .inference import answer_losses


def read(args: Any, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Encoded examples: with `val_set_size`, those that finetune holds out with it, else all of `data_path`."""
    if args.data_path is None:
        examples = stdlib_examples()[1]
    else:
        examples = file_examples(args.data_path, tokenizer, args.skip_bad_rows).examples
        if args.val_set_size:
            examples = split(examples, args.val_set_size)[1]
    rows = encode(tokenizer, examples, args.max_seq_length)
    if not rows:
        raise ValueError(f"max_seq_length={args.max_seq_length} has no room for any prompt with an answer.")
    return rows[: args.val_set_size] if args.val_set_size else rows


def run(
    args: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, list[int]]]
) -> list[dict[str, Any]]:
    """The mean loss over each answer's tokens, in nats; their mean is over answers."""
    losses = answer_losses(model, rows, args.batch_size, tokenizer.pad_token_id)
    return [{"tokens": count, "scores": {"loss": total / count}} for total, count in losses]
