"""`--push_to_hub`, against a stand-in for the hub."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

ANSWERS: dict[str, Any] = {"whoami": {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}}}


class Hub(ThreadingHTTPServer):
    """What of the hub's API `upload_folder` asks for: a repository, who uploads how, files, and commits of them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, str] = {}  # path -> content, or the checksum of a large file
        self.stored: set[str] = set()  # checksums of large files that were uploaded


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def read(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_GET(self) -> None:
        self.answer(ANSWERS["whoami"] if "whoami" in self.path else {"id": "me/x", "sha": "0" * 40, "siblings": []})

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def do_PUT(self) -> None:
        self.read()
        self.server.stored.add(self.path.rpartition("/")[2])
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        data, url = self.read(), self.server.url
        if "/repos/create" in self.path:
            self.answer({"url": f"{url}/me/x", "name": "me/x"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(data)["files"]]
            modes = {path: "lfs" if path.endswith((".safetensors", ".bin")) else "regular" for path in paths}
            answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.answer({"files": answer})
        elif self.path.endswith("/lfs/objects/batch"):
            wanted = json.loads(data)["objects"]
            actions = [{"upload": {"href": f"{url}/lfs/{one['oid']}"}} for one in wanted]
            objects = [one | {"actions": action} for one, action in zip(wanted, actions, strict=True)]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, data.decode().splitlines()):
                value = line["value"]
                if line["key"] in ("file", "lfsFile"):
                    self.server.files[value["path"]] = value.get("oid") or value["content"]
            self.answer({"commitUrl": f"{url}/me/x/commit/{'1' * 40}", "commitOid": "1" * 40, "hookOutput": ""})
        else:
            self.answer({})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_adapter_is_pushed_with_all_that_belongs_to_it(hub, tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}:", "completion": " add" * 9}) for i in range(24)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gralora.tool.cli", "finetune", "--base_model", tiny_model, "--data_path", data]
    command += ["--use_gralora", "--lora_r", "8", "--max_steps", "2", "--batch_size", "4", "--val_set_size", "4"]
    command += ["--output_dir", out, "--push_to_hub", "--hub_model_id", "me/x"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_none", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    wanted = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "metrics.json"}
    assert wanted | {"generation_config.json"} <= set(hub.files)
    assert hub.files["adapter_model.safetensors"] in hub.stored
    assert "Written by `gralora finetune`" in (out / "README.md").read_text()
