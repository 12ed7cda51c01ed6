"""A server on a free port of this machine, in a thread of its own."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny

from jx_neuron import LlamaForSampling
from jx_neuron.serve import AsyncEngine, Server, ServerSettings, app

TEMPLATE = (
    "{% if tools %}<tool_call>{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments.x }}{% endfor %}{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %};a:{% endif %}{{ suffix or '' }}"
)


def checkpoint(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A tiny Llama with a tokenizer of characters."""
    tiny.saved("llama", folder)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<0>"
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def model(folder: Path, **options: object) -> LlamaForSampling:
    return LlamaForSampling.from_pretrained(folder, **{"batch_size": 4, "n_positions": 96, **options})


@contextmanager
def running(model: object, *, most_waiting: int = 64, **settings: object) -> Iterator[str]:
    """Yields the server's address."""
    chosen = ServerSettings(names=("tiny", "other"), **{"drain_seconds": 1.0, **settings})
    listening, port = threading.Event(), []

    def ready(number: int) -> None:
        port.append(number)
        listening.set()

    application = app(model, AsyncEngine(model, most_waiting=most_waiting), chosen)
    server = Server(application, chosen, "127.0.0.1", 0, ready=ready)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    assert listening.wait(60)
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
