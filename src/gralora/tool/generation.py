"""How `chat` and `verify --served` ask a model: the tokens of a prompt, and the settings of generation."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data.tokens import prompt_ids


def chat_or_plain_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    apply_chat_template: bool,
    earlier: tuple[dict[str, str], ...] = (),
) -> list[int]:
    """Return a prompt's token ids; with `apply_chat_template`, a user's message after the messages in `earlier`.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not apply_chat_template:
        return prompt_ids(tokenizer, prompt)
    if tokenizer.chat_template is None:
        raise ValueError(f"apply_chat_template: the tokenizer {tokenizer.name_or_path!r} has no chat template.")
    messages = [*earlier, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    """Return greedy decoding at temperature 0, else nucleus sampling; the model gives its end tokens alone."""
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted({*ends, tokenizer.eos_token_id}),
        pad_token_id=tokenizer.pad_token_id,
        repetition_penalty=1.0,
        **sampling,
    )


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Return the text up to the first of the strings that is in it."""
    return text[: min((text.find(word) for word in stop if word in text), default=len(text))]
