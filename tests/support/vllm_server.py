"""``vllm serve`` in a process of its own, as tests of the plugin need it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants


class Server:
    """A running server; its model is called ``base``."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        """The text at a path."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=120) as response:
            text: str = response.read().decode()
            return text

    def post(self, path: str, **body: Any) -> tuple[int, str]:
        """Status and text of the answer."""
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def answer(self, model: str, prompt: list[int], tokens: int) -> tuple[int, list[int] | None]:
        """Status, and the tokens of a greedy answer."""
        status, text = self.post(
            "/v1/completions",
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
            detokenize=False,
        )
        if status != 200:
            print(model, text)
            return status, None
        return status, json.loads(text)["choices"][0]["token_ids"]


@contextlib.contextmanager
def serving(base: Path, *more: str, **variables: str) -> Iterator[Server]:
    """A server of `base` with the Hub of this test, until the block ends; `more` options of its command line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(base), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "base", "--dtype", "float32", "--enable-lora"]
    command += ["--max-loras", "2", "--max-num-seqs", "4", "--skip-tokenizer-init", *more]
    settings = {
        "HF_ENDPOINT": constants.ENDPOINT,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        "HF_HUB_DISABLE_XET": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    log, server = base.with_name("server.log"), Server(port)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | settings | variables, stdout=out, stderr=out, start_new_session=True
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError):
                server.get("/health")
                break
            time.sleep(1)
        yield server
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
