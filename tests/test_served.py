"""`gralora verify --served`: answers of a server, here a stand-in, against the adapter's own."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from helpers import adapted, gralora_config
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gralora.tool import cli, served
from gralora.tool.side_by_side import load_side_by_side

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """An adapter of a model with a template, whose answers end early."""
    base = tmp_path_factory.mktemp("base") / "chatty"
    shutil.copytree(tiny_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    model = AutoModelForCausalLM.from_pretrained(base)
    model = adapted(model, gralora_config(k=2, r=8, target_modules=["q_proj", "up_proj"]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # a token that each answer has soon is where it was trained to stop
    loaded = load_side_by_side([str(folder)])
    ids = torch.tensor([served.chat_or_plain_ids(loaded.tokenizer, served.PROMPTS[0], True)])
    with loaded.using("trained") as model:
        answer = model.generate(input_ids=ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
    model.get_base_model().generation_config.eos_token_id = [0, answer[-1].item()]
    model.get_base_model().generation_config.save_pretrained(folder)
    return folder


@pytest.fixture
def serve(adapter):
    """Start a server of the adapter with some of its settings changed; its address."""
    servers = []

    def start(template: str | None = None, ends: bool = True, weights: bool = True, broken: str = "") -> str:
        loaded = load_side_by_side([str(adapter)])
        if template:
            loaded.tokenizer.chat_template = template
        if not ends:
            loaded.model.get_base_model().generation_config.eos_token_id = [0]
        if not weights:
            for name, p in loaded.model.named_parameters():
                if "lora_B" in name:
                    p.data *= -3

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat = "messages" in asked
                if chat:
                    text = loaded.tokenizer.apply_chat_template(
                        asked["messages"], tokenize=False, add_generation_prompt=True
                    )
                else:
                    text = asked["prompt"]
                answer = served.own_answer(loaded, loaded.tokenizer(text, add_special_tokens=False).input_ids)
                choice = {"message": {"content": answer.text}} if chat else {"text": answer.text}
                choice["finish_reason"] = "stop" if answer.ended else "length"
                found = broken or json.dumps({"choices": [choice]})
                if asked["model"] != "mine":
                    return self.send_error(404, "no such model")
                self.send_response(200)
                self.end_headers()
                self.wfile.write(found.encode())

            def log_message(self, *_) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def verify(adapter, url: str, *flags: str, model: str = "mine") -> int:
    return cli.main(["verify", str(adapter), "--served", url, "--model", model, *flags])


def test_a_server_that_answers_as_trained(adapter, serve, capsys):
    assert verify(adapter, serve() + "/v1/") == 0
    assert capsys.readouterr().out.count("as trained") == len(served.PROMPTS)
    assert verify(adapter, serve(), "--json") == 0
    rows = json.loads(capsys.readouterr().out)["prompts"]
    assert all(row["own"] == row["chat"] == row["text"] and row["own"] for row in rows)


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"template": TEMPLATE.replace("<assistant>", "assistant says: ")}, "another chat template"),
        ({"ends": False}, "the server goes on where the adapter ends"),
        ({"weights": False}, "other weights, or another tokenizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_difference_is_named_with_its_cause(adapter, serve, capsys, changes, cause):
    assert verify(adapter, serve(**changes)) == cli.USER_ERROR
    assert cause in capsys.readouterr().err


def test_a_server_that_cannot_be_asked(adapter, serve, capsys):
    assert verify(adapter, "http://127.0.0.1:9") == cli.USER_ERROR
    assert "cannot be reached" in capsys.readouterr().err
    assert verify(adapter, serve(), model="other") == cli.USER_ERROR
    assert "answers 404" in capsys.readouterr().err
    assert verify(adapter, serve(broken="{}")) == cli.USER_ERROR
    assert "does not answer in OpenAI's form" in capsys.readouterr().err
    assert cli.main(["verify", str(adapter), "--served", "http://127.0.0.1:9"]) == cli.USER_ERROR
    assert "--served needs --model" in capsys.readouterr().err


def test_a_server_puts_the_beginning_in_front_itself():
    """A text that is asked with begins with no token that the server's tokenizer adds, or there would be two."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["a b"], vocab_size=270, special_tokens=["<s>", "</s>"])
    made._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>")
    ids = tokenizer("a b").input_ids
    assert ids[0] == 0 and served.asked_text(tokenizer, ids) == "a b"
    assert tokenizer(served.asked_text(tokenizer, ids)).input_ids == ids
    assert served.asked_text(tokenizer, ids[1:]) == "a b"
