"""Model cards of GraLoRA adapters, whoever writes them, say that `import gralora` is needed.

PEFT writes a card when it saves an adapter, and transformers' Trainer calls PEFT for its own. TRL's trainers write
over it. `say_it` follows both.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from . import seam
from .after_import import after_import

CARD = "README.md"
WORDS = "import gralora"  # a card with them says it already

NOTE = """
## Loading it needs gralora

This is a GraLoRA adapter ([arXiv 2505.20355](https://arxiv.org/abs/2505.20355)), which PEFT can load once the Python
package gralora is installed and imported. Without it, PEFT warns of unexpected keyword arguments, and refuses the
sizes of the tensors.

```python
import gralora
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("ADAPTER")  # the folder or repository that this card is in
```

For programs without gralora, `gralora export ADAPTER OUT --for peft` writes the plain LoRA that the adapter equals.
"""


def install() -> None:
    """Follow whoever writes cards; called by `import gralora`."""
    seam.wrap_model_card(_by_peft)
    after_import(seam.TRL_TRAINER, install_in_trl)


def say_it(folder: Any, model: Any) -> None:
    """Add the note to a folder's card, if there is one that lacks it and the model has a GraLoRA adapter."""
    card = Path(folder, CARD)
    configs = getattr(model, "peft_config", None) or {}
    if not any(getattr(config, "use_gralora", False) for config in configs.values()) or not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if WORDS not in text:
        card.write_text(text.rstrip() + "\n" + NOTE, encoding="utf-8")


def _by_peft(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def create_or_update_model_card(self: Any, output_dir: str) -> None:
        stock(self, output_dir)
        say_it(output_dir, self)

    return create_or_update_model_card


def install_in_trl(trainers: ModuleType) -> None:
    """Follow TRL's trainers; `trainers` is the module of their base class."""
    trainer: Any = getattr(trainers, seam.TRL_TRAINER_CLASS, None)
    stock = getattr(trainer, "create_model_card", None)
    if stock is None:
        return  # another TRL, whose card stays as it is

    @functools.wraps(stock)
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if self.is_world_process_zero():
            say_it(self.args.output_dir, self.accelerator.unwrap_model(self.model))

    trainer.create_model_card = create_model_card
