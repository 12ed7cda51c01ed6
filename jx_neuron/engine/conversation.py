"""A conversation: prompts of which each begins as the one before, with its answer, ended."""

from collections.abc import Generator
from contextlib import closing
from itertools import takewhile

from jx_neuron.engine.engine import Engine
from jx_neuron.engine.generation import Request, start
from jx_neuron.engine.sequence import Sequence
from jx_neuron.engine.ticket import Event


class Conversation:
    """Answers prompts one after another. What a prompt has in common with the last prompt and its answer is taken from
    the slot that holds it, unless other requests have needed that slot."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._last: Sequence | None = None

    def answer(self, request: Request) -> Generator[Event, None, None]:
        """Yields the events of one answer. Closing the generator cancels it."""
        with self._engine.lock:  # not stepped before the source is set
            (running,) = start(self._engine, request)
            sequence = running.ticket.sequence
            if (last := self._last) is not None:
                pairs = zip(sequence.tokens, last.tokens[: len(last.extents)], strict=False)
                common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                sequence.source, sequence.extents[:common] = last, last.extents[:common]
            self._last = sequence
        with closing(running.ticket):
            while True:
                event = running.next()
                yield event
                if event.finish_reason is not None:
                    return
