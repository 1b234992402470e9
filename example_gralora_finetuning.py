"""Fine-tune a language model with GraLoRA; the same as the command `gralora finetune`.

python example_gralora_finetuning.py --base_model "gpt2" --use_gralora --gralora_scaling matched
"""

import sys

from gralora_command import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
