"""Log-probabilities in the forms of OpenAI's completions and chat, and vLLM's of prompts."""

from collections.abc import Sequence
from typing import Any

from jx_neuron.engine.likelihood import Likelihood
from jx_neuron.engine.ticket import Event
from jx_neuron.serve.served import Served

LEAST = -9999.0  # JSON has no -inf
Top = Sequence[tuple[int, float]]


class Texts:
    """Tokens as texts, or as "token_id:…" where a request asks for that."""

    def __init__(self, served: Served, as_ids: bool):
        self._served, self._as_ids = served, as_ids

    def __call__(self, id: int) -> str:
        return f"token_id:{id}" if self._as_ids else self._served.token_text(id)


class CompletionLogprobs:
    """The `logprobs` of a completion: the tokens' texts, their log-probabilities, and where they begin in the text."""

    def __init__(self, texts: Texts, count: int):
        self._texts, self._count, self._offset = texts, count, 0

    def of_prompt(self, prompt: Sequence[int], values: Sequence[Likelihood | None]) -> dict[str, list[Any]]:
        """Those of a prompt's tokens; the first has none."""
        rows = [
            (id, None, ()) if one is None else (id, one.logprob, one.top)
            for id, one in zip(prompt, values, strict=True)
        ]
        return self._columns(rows)

    def of(self, event: Event) -> dict[str, list[Any]]:
        """Those of a token of the answer."""
        return self._columns([(event.token, event.logprob, event.top)])

    def _columns(self, rows: Sequence[tuple[int, float | None, Top]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for id, logprob, top in rows:
            text = self._texts(id)
            columns["tokens"].append(text)
            columns["token_logprobs"].append(None if logprob is None else max(logprob, LEAST))
            columns["text_offset"].append(self._offset)
            self._offset += len(text)
            if logprob is None:
                columns["top_logprobs"].append(None)
                continue
            several: dict[str, float] = {}
            for one, value in (*top[: self._count], (id, logprob)):
                several.setdefault(self._texts(one), max(value, LEAST))  # ids may share a text: the likelier stays
            columns["top_logprobs"].append(several)
        return columns


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """The `logprobs` of several parts of a completion."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def chat_logprob(texts: Texts, event: Event) -> dict[str, Any]:
    """An entry of a chat's `logprobs`."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        text = texts(id)
        whole = None if "\ufffd" in text else list(text.encode())
        return dict(token=text, logprob=max(logprob, LEAST), bytes=whole)

    top = [entry(id, logprob) for id, logprob in event.top]
    return entry(event.token, event.logprob or 0.0) | dict(top_logprobs=top)


def prompt_logprobs(served: Served, prompt: Sequence[int], values: Sequence[Likelihood | None]) -> list[Any]:
    """vLLM's `prompt_logprobs`: for each token after the first, a mapping of ids."""

    def entry(id: int, logprob: float, rank: int) -> dict[str, Any]:
        return dict(logprob=max(logprob, LEAST), rank=rank, decoded_token=served.token_text(id))

    return [
        None
        if one is None
        else {str(id): entry(id, one.logprob, one.rank)}
        | {str(top): entry(top, logprob, rank) for rank, (top, logprob) in enumerate(one.top, 1)}
        for id, one in zip(prompt, values, strict=True)
    ]
