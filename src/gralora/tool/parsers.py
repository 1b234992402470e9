"""Command lines of the commands that are no flags of a trainer, each by a function that is called as its command is.

Nothing here imports torch, so that their help comes at once (`gralora_command.LIGHT`). The names of formats, programs
and modes are therefore written down here once more; tests/test_cli.py compares them with the tables that they are of.
"""

import argparse
from pathlib import Path

from gralora_command import Parser, add_output_flags, load_light

DTYPES = ("float32", "bfloat16", "float16")
READABLE = ("gralora", "peft", "squeezebits", "fork")  # formats of adapters
WRITABLE = ("gralora", "peft")
TARGETS = (
    "peft",
    "vllm",
    "sglang",
    "llamacpp",
    "ollama",
    "mlx",
    "diffusers",
)  # programs that a plain LoRA is exported for
GGUF_TARGETS = ("llamacpp", "ollama")
TRUNCATION_MODES = ("keep_start", "keep_end")
LENGTH = 2048  # tokens at which texts are cut
EMBEDDED = "embedded"  # the base model that needs no hub
CHAT_COMMANDS = """  /adapter            show which adapters there are
  /adapter on         switch the first adapter on
  /adapter off        the base model alone
  /adapter NAME       switch to an adapter
  /compare PROMPT     answers of the base model and of each adapter; not kept
  /reset              forget the conversation
  /help               show this
  /quit               leave (also Ctrl-D); Ctrl-C stops an answer"""


def _parser(name: str, description: str, epilog: str) -> Parser:
    return Parser(
        prog=f"gralora {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def data() -> Parser:
    parser = _parser(
        "data",
        "Show what training data become: their layouts, lengths, what is learnt, cut and not used.",
        "examples:\n  gralora data chats.jsonl --base_model MODEL\n"
        "  gralora data chats.jsonl more/ --base_model MODEL --max_seq_length 4096 --rows 5\n"
        "exit status: 0 done, 2 data that cannot be trained on",
    )
    add = parser.add_argument
    add("data_path", nargs="+", help="local files, folders, or ids of data sets on the hub")
    add("--base_model", "--model_name_or_path", default=EMBEDDED, help="whose tokenizer and template are used")
    add("--chat_template_path", help="a Jinja file, or a model whose template is used instead")
    add("--train_split", help="split of the data set, or what the names of a folder's files begin with")
    text = f"tokens at which texts are cut (default: {LENGTH} or the model's)"
    add("--max_seq_length", "--max_length", type=int, help=text)
    add("--truncation_mode", choices=TRUNCATION_MODES, default="keep_start", help="what of a long text is kept")
    add("--train_on_inputs", action="store_true", help="learn prompts too")
    add("--skip_bad_rows", action="store_true", help="count broken rows instead of stopping at the first")
    add("--rows", type=int, default=2, help="texts to show, with what is learnt marked (default: 2)")
    add("--color", choices=("auto", "always", "never"), default="auto", help="mark what is learnt in colour")
    add_output_flags(parser)
    return parser


def chat() -> Parser:
    parser = _parser(
        "chat",
        "Talk to a model with adapters. Prompts are read from standard input, a line each.",
        "examples:\n  gralora chat outputs/finetune\n"
        '  gralora chat outputs/lora outputs/gralora --temperature 0 --system "Answer in one sentence."\n'
        '  echo "/compare What is a rank?" | gralora chat outputs/finetune --template instruction\n\n'
        f"commands:\n{CHAT_COMMANDS}",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders of adapters; or the base model: hub id, folder, embedded")
    add("--base_model", "--model_name_or_path", help="in place of the base model that the adapters name")
    add("--system", help="what the chat begins with, in the role of the system")
    add(
        "--template",
        choices=("auto", "chat", "instruction", "plain"),
        default="auto",
        help="chat: the tokenizer's template; instruction: as finetune writes instruction+output, query+response and "
        "question+answer; plain: each line is continued (default: chat if there is a template, else plain)",
    )
    add("--max_new_tokens", type=int, default=256, help="length of an answer (default: 256)")
    add("--temperature", type=float, default=0.7, help="0: greedy (default: 0.7)")
    add("--top_p", type=float, default=0.95, help="with a temperature: nucleus (default: 0.95)")
    add("--seed", type=int, help="makes answers repeatable; set before each of them")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the base model (default: as it is stored)")
    add("--device", help="e.g. cpu or cuda:1 (default: the accelerator if there is one)")
    return parser


def _of_adapter(name: str, description: str, example: str) -> Parser:
    """A parser whose first argument is an adapter."""
    parser = _parser(name, description, example)
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    if name != "inspect":  # which is all output
        parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--from",
        dest="source",
        choices=READABLE,
        help="format of ADAPTER, where its config leaves open which program wrote it",
    )
    if name != "inspect":
        add_output_flags(parser)
    return parser


def convert() -> Parser:
    parser = _of_adapter(
        "convert",
        "Write a GraLoRA adapter in another format. Reads gralora's, PEFT's GRALORA, the SqueezeBits repository's and "
        "the HaohanTsao/peft fork's.",
        "example:\n  gralora convert ADAPTER OUT --to peft",
    )
    parser.add_argument("--to", choices=WRITABLE, default="gralora", help="format of OUT (default: gralora)")
    return parser


def export() -> Parser:
    parser = _of_adapter(
        "export",
        "Write a GraLoRA adapter as the plain LoRA that it equals, exactly, and print the line that serves it.",
        "example:\n  gralora export ADAPTER OUT --for vllm --base MODEL",
    )
    add = parser.add_argument
    add("--for", dest="target", choices=TARGETS, required=True, help="the program that will serve it")
    add("--base", type=Path, help="folder of the base model, to read its config and compare logits")
    without_base = f"{', '.join(GGUF_TARGETS)} without --base"
    add("--arch", help=f"{without_base}: the base's model_type, e.g. llama")
    add("--heads", type=int, help=f"{without_base}: the base's num_attention_heads")
    add("--kv-heads", type=int, help=f"{without_base}: its num_key_value_heads")
    add("--max-rank", type=int, help="highest rank wanted; a higher one needs --lossy")
    add("--lossy", action="store_true", help="approximate layers of a rank above the limit, by SVD")
    add("--dtype", choices=DTYPES, help="of the factors (default: the adapter's, if that is exact)")
    return parser


def merge() -> Parser:
    parser = _of_adapter(
        "merge",
        "Write the base model with the adapter merged in, file by file. Run it again to resume after an interruption.",
        "example:\n  gralora merge ADAPTER OUT --base MODEL --dtype bfloat16",
    )
    add = parser.add_argument
    add("--base", type=Path, help="folder of the base model (default: what the adapter names)")
    add("--dtype", choices=DTYPES, help="of the merged weights (default: each keeps its own)")
    add("--device", default="cpu", help="where updates are computed (default: cpu)")
    return parser


def inspect() -> Parser:
    parser = _of_adapter(
        "inspect",
        "Show format, sizes, norms and ranks of an adapter, and anomalies.",
        "examples:\n  gralora inspect ADAPTER\n  gralora inspect ADAPTER --json --png norms.png",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--png", type=Path, help="also draw the norms of all layers into this file, by kind and depth")
    add("--layers", metavar="REGEX", help="with --png: draw the norms of the k x k blocks of layers that it matches")
    return parser


def verify() -> Parser:
    parser = _parser(
        "verify",
        "Reload and merge an adapter that `finetune --verify` saved, and compare logits with those of training; or, "
        "with --served, compare a server's answers with the adapter's own.",
        "examples:\n  gralora verify outputs/finetune\n"
        "  gralora verify outputs/finetune --served http://localhost:8000 --model finetuned",
    )
    parser.add_argument("adapter", help="the output_dir of gralora finetune --verify")
    add_output_flags(parser)
    parser.add_argument("--served", metavar="URL", help="of a server with OpenAI's API, such as vLLM's or llama.cpp's")
    parser.add_argument("--model", metavar="NAME", help="with --served: the name under which it serves the adapter")
    return parser


def run() -> Parser:
    parser = _parser(
        "run",
        "Start a program that trains LoRA with PEFT, and make its LoRA GraLoRA. The flags may also stand among the "
        "program's own.",
        "examples:\n  gralora run --gralora_k 4 -- trl sft --use_peft --lora_r 64 \\\n"
        "      --model_name_or_path MODEL --dataset_name DATA\n"
        "  gralora run -- llamafactory-cli train sft.yaml --gralora_k 4 --hybrid_r 8\n"
        "  gralora run --hybrid_r 8 -- torchrun --nproc_per_node 4 train.py",
    )
    parser.usage = "gralora run [flags] -- PROGRAM [ARGUMENTS]"
    for name, text in load_light("gralora.settings").HELP.items():
        parser.add_argument(f"--{name}", help=text)
    return parser
