"""Switch between several adapters on one base model, as `evaluate` and `chat` do to compare them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.files import CONFIG, read_json
from ..checkpoints.load import load_adapter
from .embedded import embedded_model
from .models import EMBEDDED, load_language_model, load_tokenizer

TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"


@dataclass
class SideBySide:
    """A base model and its adapters.

    Attributes:
        model: the base model, or a PeftModel if there are adapters on it.
        tokenizer: the tokenizer for all of them.
        adapters: label -> name of the adapter in `model`, or None for the base model alone.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    adapters: dict[str, str | None]

    @contextmanager
    def using(self, label: str) -> Iterator[PreTrainedModel | PeftModel]:
        """Yield the model with only the adapter of this label active, for the length of the block."""
        adapter = self.adapters[label]
        if adapter is None:
            with self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext():
                yield self.model
        else:
            self.model.set_adapter(adapter, inference_mode=True)
            yield self.model


def is_adapter(path: str) -> bool:
    return Path(path, CONFIG).is_file()


def load_side_by_side(
    models: list[str], base_model: str | None = None, dtype: str = "auto", device: str | None = None
) -> SideBySide:
    """Load one base model and put the adapters on it.

    Args:
        models: folders of adapters (GraLoRA of any format, or plain LoRA), and the base model to compare it, too.
        base_model: used in place of the base model that the adapters name.
        dtype: torch's name for the base model's dtype, or "auto" for the stored one. Adapters are held in float32.
        device: torch's name for the device; by default the accelerator if there is one.

    Raises:
        ValueError: if the adapters have different base models, or one does not fit.
        OSError: if files are missing.
    """
    labels = unique_labels(models)
    base = common_base(models, base_model)
    trained = [path for path in models if is_adapter(path)]
    tokenizer = common_tokenizer(models, base)
    model = load_language_model(base, dtype=dtype).eval().to(device or default_device())
    for path in trained:
        stop_where_trained(model, path)
    adapters: dict[str, str | None] = {}
    for number, (label, path) in enumerate(zip(labels, models, strict=True)):
        adapters[label] = None
        if is_adapter(path):
            adapters[label] = f"adapter_{number}"
            try:
                model = load_adapter(model, path, adapters[label])
            except ValueError as error:
                raise ValueError(f"adapter {path!r}: {error}") from error
    return SideBySide(model.eval(), tokenizer, adapters)


def common_tokenizer(models: list[str], base: str) -> PreTrainedTokenizerBase:
    """Load the first adapter's tokenizer, which has the chat template of its training, or else the base model's."""
    return load_tokenizer(tokenizer_of(models, base))


def tokenizer_of(models: list[str], base: str) -> str:
    """Return which of them has the tokenizer: the first adapter with one, or else the base model."""
    return next((path for path in models if is_adapter(path) and Path(path, TOKENIZER).is_file()), base)


def stop_where_trained(model: PreTrainedModel, adapter: str | Path | None) -> None:
    """Make the model stop also at the tokens at which an adapter, if there is one, says it was trained to stop."""
    if adapter is None or not Path(adapter, GENERATION).is_file():
        return

    def ends(tokens: int | list[int] | None) -> list[int]:
        return [tokens] if isinstance(tokens, int) else list(tokens or [])

    own = ends(model.generation_config.eos_token_id)
    more = ends(GenerationConfig.from_pretrained(adapter).eos_token_id)
    if set(more) - set(own):
        model.generation_config.eos_token_id = [*own, *(token for token in more if token not in own)]


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def unique_labels(models: list[str]) -> list[str]:
    """Label each model by its folder's name, or by the path as given if names clash; ValueError if paths clash."""
    short = [Path(model).name or model for model in models]
    labels = [model if short.count(name) > 1 else name for model, name in zip(models, short, strict=True)]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"model {label!r} is given twice.")
    return labels


def common_base(models: list[str], base_model: str | None = None) -> str:
    """Find the base model that all models share; `base_model`, if given, replaces those that adapters name."""
    bases = {}
    for model in models:
        if not is_adapter(model):
            bases[model] = model
        elif base_model is None:
            bases[model] = read_json(Path(model, CONFIG)).get("base_model_name_or_path")
            if not bases[model]:
                raise ValueError(f"adapter {model!r} does not name its base model; give --base_model.")
    if base_model is not None:
        bases["--base_model"] = base_model
    found = {place(base) for base in bases.values()}
    if len(found) > 1:
        listed = "; ".join(f"{model}: {base}" for model, base in bases.items())
        raise ValueError(
            f"these are of different base models, and can only be compared on one: {listed}. If these are copies of "
            "one model, give --base_model and, for the base alone, the same."
        )
    return next(iter(bases.values()))


def place(base_model: str) -> str:
    """Resolve a base model to its folder or hub id, by which base models are told apart."""
    if base_model == EMBEDDED:
        return str(embedded_model().resolve())
    return str(Path(base_model).resolve()) if Path(base_model).is_dir() else base_model
