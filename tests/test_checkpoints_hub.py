"""Checkpoints from the hub: against a small server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from checkpoint_helpers import PRE_NORM, assert_same, make_params, make_state, write_config

from optjax import load_params, save_params
from optjax.checkpoints.hub import resolve_source

COMMIT, OLD = "a" * 40, "b" * 40
PROGRAM = """
import json, sys
from optjax.checkpoints.hub import resolve_source
for arguments in json.loads(sys.argv[1]):
    try:
        print("RESULT", json.dumps(["path", str(resolve_source(**arguments))]))
    except Exception as error:
        print("RESULT", json.dumps([type(error).__name__, str(error)]))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories are folders ``root/org/name/revision``."""

    root: Path
    log: list[str]
    cut: set[str]  # Names of files that are sent to the half, once.
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(send=True)

    def do_HEAD(self):
        self.answer(send=False)

    def answer(self, send: bool) -> None:
        path = unquote(urlparse(self.path).path)
        self.log.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        api = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([\w.-]+))?/?", path)
        resolve = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", path)
        found = api or resolve
        repo = found[1] if found else ""
        if not (self.root / repo).is_dir() or not repo:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, send)
        if repo == "org/gated" and self.headers.get("Authorization") != "Bearer hf_secret":
            return self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"}, send)
        revision = {"main": COMMIT, "v1": OLD, None: COMMIT}.get(
            (api[3] if api else found[2]), api[3] if api else found[2]
        )
        folder = self.root / repo / revision
        if not folder.is_dir():
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, send)
        if api:
            files = sorted(p.name for p in folder.iterdir())
            if api[2] == "tree":
                body: object = [
                    {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0"} for f in files
                ]
            else:
                body = {"id": repo, "sha": revision, "siblings": [{"rfilename": f} for f in files]}
            return self.reply(200, json.dumps(body).encode(), {}, send)
        assert resolve
        file = folder / resolve[3]
        if not file.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, send)
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.reply(206, data[start:], headers, send)
        if send and file.name in self.cut:
            self.cut.discard(file.name)
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        return self.reply(200, data, headers, send)

    def reply(self, status: int, body: bytes, headers: dict[str, str], send: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path):
    """The server's handler, its address, and a function that resolves sources in a fresh process."""
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "log": [], "cut": set()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def resolve(*calls: dict, **environment: str) -> list[list[str]]:
        variables = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "JAX_PLATFORMS": "cpu",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        arguments = [sys.executable, "-c", PROGRAM, json.dumps(calls)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        out = subprocess.run(arguments, env=clean | variables | environment, check=True, capture_output=True, text=True)
        return [
            json.loads(line.removeprefix("RESULT ")) for line in out.stdout.splitlines() if line.startswith("RESULT")
        ]

    yield handler, resolve
    server.shutdown()
    server.server_close()
    thread.join()


def publish(root: Path, repo: str, *files: str, revision: str = COMMIT, seed: int = 0) -> None:
    """A model in one safetensors file, several, or files of other formats that hold nothing."""
    folder = root / repo / revision
    folder.mkdir(parents=True)
    save_params(make_params(PRE_NORM, seed=seed), folder, max_shard_size="15KB" if "sharded" in files else "5GB")
    if "model.safetensors" not in files and "sharded" not in files:
        (folder / "model.safetensors").unlink()
    for name in {*files} - {"model.safetensors", "sharded"}:
        (folder / name).write_bytes(b"x")


def test_the_best_format_alone_is_downloaded(hub):
    handler, resolve = hub
    others = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", "tokenizer.json", "merges.txt")
    publish(handler.root, "org/all", "model.safetensors", *others)
    publish(handler.root, "org/sharded", "sharded", "pytorch_model-00001-of-00002.bin", "vocab.json")
    publish(handler.root, "org/bin", *others)
    publish(handler.root, "org/flax", "flax_model.msgpack", "tf_model.h5")
    publish(handler.root, "org/pt", "reshard-model_part-0.pt", "reshard-model_part-1.pt")
    names = ["all", "sharded", "bin", "flax", "pt"]
    results = resolve(*[{"source": f"org/{name}"} for name in names], {"source": "org/all", "weights": False})
    got = [sorted(p.name for p in Path(path).iterdir()) for kind, path in results if kind == "path"]
    small = ["config.json", "generation_config.json"]
    assert got[0] == got[5] == sorted([*small, "merges.txt", "model.safetensors", "tokenizer.json"])
    assert len([n for n in got[1] if n.endswith(".safetensors")]) > 2 and "vocab.json" in got[1]
    assert "model.safetensors.index.json" in got[1] and not [n for n in got[1] if n.endswith(".bin")]
    assert got[2] == sorted([*small, "merges.txt", "pytorch_model.bin", "tokenizer.json"])
    assert got[3] == sorted([*small, "flax_model.msgpack"])
    assert got[4] == sorted([*small, "reshard-model_part-0.pt", "reshard-model_part-1.pt"])
    for path in (results[0][1], results[1][1]):
        assert_same(load_params(path), make_state(PRE_NORM))


def test_tokenizer_files_alone(hub):
    handler, resolve = hub
    publish(handler.root, "org/model", "model.safetensors", "tokenizer.json")
    (kind, path), *_ = resolve({"source": "org/model", "weights": False})
    assert kind == "path" and "model.safetensors" not in os.listdir(path) and "tokenizer.json" in os.listdir(path)


def test_revisions_and_tokens(hub):
    handler, resolve = hub
    publish(handler.root, "org/model", "model.safetensors", seed=1)
    publish(handler.root, "org/model", "model.safetensors", revision=OLD, seed=2)
    publish(handler.root, "org/gated", "model.safetensors", seed=3)
    results = resolve(
        {"source": "org/model"},
        {"source": "org/model", "revision": "v1"},
        {"source": "org/gated", "token": "hf_secret"},
        {"source": "org/gated"},
        {"source": "org/model", "revision": "v9"},
        {"source": "org/unknown"},
        {"source": "just-a-name"},
        {"source": "OPT-125m"},
    )
    for (_, path), seed in zip(results[:3], (1, 2, 3), strict=True):
        assert_same(load_params(path), make_state(PRE_NORM, seed=seed))
    gated, revision, unknown, name, size = results[3:]
    assert gated[0] == "ValueError" and "pass token=" in gated[1]
    assert revision == ["FileNotFoundError", "'org/model' is on the hub, but has no revision 'v9'"]
    assert unknown[0] == "FileNotFoundError" and "no such model on the hub" in unknown[1]
    assert name[0] == "FileNotFoundError" and "'just-a-name'" in name[1] and "facebook" not in name[1]
    assert size[0] == "FileNotFoundError" and "(the weights of opt-125m are 'facebook/opt-125m')" in size[1]


def test_an_interrupted_download_resumes(hub):
    handler, resolve = hub
    publish(handler.root, "org/model", "reshard.pt")
    data = os.urandom(1 << 20) * 24  # Downloads go to the disk in pieces of 10 MB.
    (handler.root / "org/model" / COMMIT / "reshard.pt").write_bytes(data)
    handler.cut.add("reshard.pt")
    (kind, message), (offline, _), (path, folder) = (
        resolve({"source": "org/model"}, **environment)[0] for environment in ({}, {"HF_HUB_OFFLINE": "1"}, {})
    )
    assert kind == "ConnectionError" and "a second attempt goes on" in message
    assert offline == "FileNotFoundError"  # Half a checkpoint will not do.
    assert path == "path" and not handler.cut
    assert (Path(folder) / "reshard.pt").read_bytes() == data
    assert any(re.search(r"reshard\.pt bytes=[1-9]\d{6,}-", line) for line in handler.log), handler.log


def test_without_network(hub, tmp_path):
    handler, resolve = hub
    publish(handler.root, "org/model", "model.safetensors")
    here = resolve({"source": "org/model"})[0]
    asked = len(handler.log)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        calls = {"source": "org/model"}, {"source": "org/other"}, {"source": "galactica-1.3b"}
        again, missing, size = resolve(*calls, **environment)
        assert again == here
        assert missing[0] == "FileNotFoundError" and "'org/other' cannot be reached" in missing[1]
        assert "(the weights of galactica-1.3b are 'facebook/galactica-1.3b')" in size[1]
    assert len(handler.log) == asked


def test_a_model_of_another_kind(hub):
    handler, resolve = hub
    publish(handler.root, "org/model", "model.gguf", "README.md")
    kind, message = resolve({"source": "org/model"})[0]
    assert kind == "NoCheckpointError" and "holds no checkpoint that optjax reads; its files: README.md" in message


def test_paths_and_the_packaged_model(tmp_path, monkeypatch):
    """None of these ask the hub."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    write_config(PRE_NORM, tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve_source("org/model") == Path("org/model")
    assert resolve_source(tmp_path / "org" / "model") == tmp_path / "org" / "model"
    assert (resolve_source("opt-mini") / "config.json").is_file()
    for source in (Path("org/nothing"), "a/b/c", "../nothing", "", "org/mo del", "org\\model", "http://example.org/x"):
        with pytest.raises(FileNotFoundError, match="no file or folder at"):
            resolve_source(source)
