"""The scheduler and the engine, over a runtime made of arithmetic: each request gets what it gets alone."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from arithmetic import VOCAB, Arithmetic, base, following

from jx_neuron.engine.drafting import NgramDrafter
from jx_neuron.engine.draw import Draw, keys
from jx_neuron.engine.engine import Engine
from jx_neuron.engine.options import Choice
from jx_neuron.engine.processors import Processors
from jx_neuron.engine.rows import Rows
from jx_neuron.engine.scheduler import VERIFY_SIZES, Scheduler
from jx_neuron.engine.scoring import log_likelihoods
from jx_neuron.engine.ticket import Ticket
from jx_neuron.step.buckets import Buckets
from jx_neuron.step.program_key import ProgramKey

GREEDY = Draw(1.0, 1, 1.0, 0.0, 1, 1, None)
CHOICE = Choice(GREEDY, Processors(), 8, (), (), None)


def engine_of(
    batch_sizes=(1, 2, 4),
    tokens=(16, 32, 64),
    context=(4, 8),
    *,
    compiled=None,
    budget=None,
    prompt_rows=None,
    window=None,
) -> Engine:
    """An engine; `compiled` is how many candidates programs have, where they are made beforehand."""
    buckets = Buckets(tuple(context), tuple(tokens))
    programs = None
    if compiled is not None:
        programs = frozenset(
            replace(key, kind=kind) if key.kind == "prefill" else key
            for rows in {*batch_sizes, *(prompt_rows or ())}
            for key in buckets.programs(rows, compiled)
            for kind in ("prefill", "score")
        )
        verify = [(rows, t, s) for rows in batch_sizes for t in VERIFY_SIZES for s in tokens]
        programs |= {ProgramKey("verify", *sizes, compiled) for sizes in verify}
    scheduler = Scheduler(
        buckets,
        batch_sizes,
        prompt_rows,
        None if compiled is None else buckets.context[-1:],
        candidates=compiled,
        window=window,
        budget=budget,
    )
    runtime = Arithmetic(batch_sizes[-1] + (compiled is None), tokens[-1], programs, window)
    return Engine(runtime, scheduler, VOCAB)


def alone(prompt: list[int], choice: Choice) -> list[int]:
    answer: list[int] = []
    while len(answer) < choice.steps:
        tokens = prompt + answer
        answer.append(following(tokens, choice.draw, len(answer)))
        if answer[-1] in choice.eos:
            break
    return answer


def drain(ticket: Ticket) -> list[int]:
    return [event.token for event in ticket]


@dataclass(eq=False)
class Guesses:
    """Guesses the first token that may follow, and at times another; some guesses are of no vocabulary."""

    rng: random.Random
    pause: int = 2

    def propose(self, rows):
        for row in rows:
            tokens = list(row.tokens)
            for _ in range(row.wanted):
                tokens.append(base(tokens) if self.rng.random() < 0.9 else self.rng.randrange(-2, 2 * VOCAB))
            yield tokens[len(row.tokens) :]

    def close(self, row) -> None:
        pass


@dataclass
class Caller:
    prompt: list[int]
    choice: Choice
    ticket: Ticket
    answer: list[int]
    begun: int


def choice_of(rng: random.Random, room: int) -> Choice:
    draw = GREEDY
    if rng.random() < 0.5:
        draw = Draw(1.0, 5, 1.0, 0.0, 1, 8, keys(rng.randrange(1000), 1)[0])
    processors = Processors(presence_penalty=1e-30) if rng.random() < 0.2 else Processors()
    eos = (rng.randrange(VOCAB),) if rng.random() < 0.5 else ()
    return Choice(draw, processors, rng.randint(1, room), eos, (), None)


@pytest.mark.few(6)
@pytest.mark.parametrize("compiled", [None, 8], ids=["on demand", "compiled"])
@pytest.mark.parametrize("budget", [None, 5, 40, "reserved"])
@pytest.mark.parametrize("window", [None, 9, 0])
@pytest.mark.parametrize("turns", [700, pytest.param(17_000, marks=pytest.mark.slow)])
def test_any_schedule_gives_each_request_what_it_gets_alone(compiled, budget, window, turns) -> None:
    rng = random.Random(f"{compiled} {budget}")
    engine = engine_of(compiled=compiled, budget=None if budget == "reserved" else budget, window=window)
    rest = list(engine.reserve(40, drafter=NgramDrafter())) if budget == "reserved" else []
    capacity = engine.scheduler.buckets.capacity
    prefixes = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(3)]
    callers: list[Caller] = []
    finished = cancelled = accepted = 0
    for turn in range(turns):
        if len(callers) < 12 and rng.random() < 0.35:
            prompt = rng.choice([[], *prefixes]) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 25))]
            choices = [choice_of(rng, capacity - len(prompt)) for _ in range(rng.choice([1, 1, 1, 3]))]
            drafter = rng.choice([None, NgramDrafter(), Guesses(rng)])
            tickets = engine.submit(prompt, choices, drafter=drafter)
            callers += [Caller(prompt, c, t, [], turn) for c, t in zip(choices, tickets, strict=True)]
        if rng.random() < 0.02:
            engine.keep_prefix(rng.choice([None, *prefixes]))
        if rest and rng.random() < 0.1:
            engine.runtime.load([rest.pop()])
        engine.step()
        owners = [slot.sequence for slot in engine.scheduler.slots if slot.sequence is not None]
        assert len({id(owner) for owner in owners}) == len(owners)
        for caller in list(callers):
            while caller.ticket.ready:
                event = next(caller.ticket)
                caller.answer.append(event.token)
                if event.finish_reason is not None:
                    assert caller.answer == alone(caller.prompt, caller.choice)
                    callers.remove(caller)
                    finished += 1
                    accepted += caller.ticket.drafts.accepted if caller.ticket.drafts else 0
            if caller in callers and rng.random() < 0.01:
                assert caller.answer == alone(caller.prompt, caller.choice)[: len(caller.answer)]
                caller.ticket.close()
                callers.remove(caller)
                cancelled += 1
        assert all(turn - caller.begun < 600 for caller in callers), "a request starves"
    for caller in callers:
        assert caller.answer + drain(caller.ticket) == alone(caller.prompt, caller.choice)
    engine.step()
    assert not engine.scheduler.busy
    assert engine.scheduler.slots.free >= 4
    assert finished > turns / 20
    assert accepted > turns / 20 or window == 9
    assert cancelled > turns / 500


def test_requests_that_come_later_join_those_under_way() -> None:
    engine = engine_of()
    (first,) = engine.submit([1, 2, 3], [replace(CHOICE, steps=20)])
    early = [next(first).token for _ in range(5)]
    (second,) = engine.submit([4] * 11, [replace(CHOICE, steps=5)])
    assert drain(second) == alone([4] * 11, replace(CHOICE, steps=5))
    assert early + drain(first) == alone([1, 2, 3], replace(CHOICE, steps=20))
    decoded = [run.arrays["length_b"].sum() for run in engine.runtime.runs if run.key.kind == "decode"]
    assert len(decoded) < 19 + 4  # they shared turns
    assert max(decoded) == 2


def test_a_row_that_ends_makes_room_for_a_smaller_step() -> None:
    engine = engine_of(batch_sizes=(1, 4))
    tickets = [engine.submit([n + 1], [replace(CHOICE, steps=3 if n < 3 else 30)])[0] for n in range(4)]
    answers = [drain(ticket) for ticket in tickets]
    assert answers == [alone([n + 1], replace(CHOICE, steps=3 if n < 3 else 30)) for n in range(4)]
    assert [run.key.rows for run in engine.runtime.runs if run.key.kind == "decode"][-20:] == [1] * 20


def test_several_answers_compute_the_prompt_once() -> None:
    engine = engine_of()
    prompt = list(range(1, 20))
    choices = [replace(CHOICE, draw=Draw(1.0, 5, 1.0, 0.0, 1, 8, key)) for key in keys(3, 6)]
    tickets = engine.submit(prompt, choices)
    assert [drain(ticket) for ticket in tickets] == [alone(prompt, choice) for choice in choices]
    computed = sum(int(np.minimum(run.arrays["length_b"], run.key.tokens).sum()) for run in engine.runtime.runs)
    assert computed < len(prompt) + 6 * 8


def test_a_kept_prefix_is_computed_once() -> None:
    for compiled in (None, 8):
        engine = engine_of(compiled=compiled)
        prefix = list(range(1, 14))
        engine.keep_prefix(prefix)
        before = len(engine.runtime.runs)
        for n in range(3):
            assert drain(engine.submit([*prefix, n, n], [CHOICE])[0]) == alone([*prefix, n, n], CHOICE)
        starts = [int(run.arrays["start_b"].max()) for run in engine.runtime.runs[before:]]
        assert min(starts) >= len(prefix)


def test_turns_run_what_is_loaded_while_the_rest_is_loaded() -> None:
    rng, engine = random.Random(0), engine_of()
    rest = list(engine.reserve(16))
    assert sorted(key.kind for key in engine.runtime.ready) == ["decode", "prefill", "score"]
    callers: list[tuple[list[int], Choice, Ticket]] = []
    while rest or engine.scheduler.busy:
        if rest:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))]
            choice = choice_of(rng, 20)
            scored = rng.choice([None, None, 0])
            callers.append((prompt, choice, engine.submit(prompt, [choice], prompt_logprobs=scored)[0]))
            engine.runtime.load([rest.pop(rng.randrange(len(rest)))])
        for _ in range(8):
            ready, before = set(engine.runtime.ready), len(engine.runtime.runs)
            engine.step()
            assert {step.key for step in engine.runtime.runs[before:]} <= ready
    for prompt, choice, ticket in callers:
        assert drain(ticket) == alone(prompt, choice)
    (ticket,) = engine.submit([1, 2, 3], [CHOICE])
    assert drain(ticket) == alone([1, 2, 3], CHOICE)
    assert [step.key.name for step in engine.runtime.runs[-8:]] == [
        f"context4-b1-s4-k{VOCAB}",
        *[f"decode-b1-s16-k{VOCAB}"] * 7,
    ]


def test_several_prompts_go_through_together_within_a_budget() -> None:
    for budget, rows in ((16, [2, 2]), (32, [4]), (1, [1] * 4)):
        engine = engine_of()
        engine.runtime.load(engine.reserve(budget))
        tickets = [engine.submit([n] * 7, [CHOICE])[0] for n in range(4)]
        assert [drain(ticket) for ticket in tickets] == [alone([n] * 7, CHOICE) for n in range(4)]
        assert [step.key.rows for step in engine.runtime.runs if step.key.tokens == 8] == rows


def test_a_conversation_goes_on_from_the_tokens_that_were_drawn() -> None:
    engine = engine_of()
    engine.reserve(16)
    prompt = list(range(1, 12))
    answer = drain(engine.submit(prompt, [CHOICE])[0])
    longer = [*prompt, *answer, 5, 6, 7]
    (ticket,) = engine.submit(longer, [CHOICE])
    assert drain(ticket) == alone(longer, CHOICE)
    assert ticket.sequence.cached == len(prompt) + len(answer) - 1  # the last that was drawn was not computed
    (ticket,) = engine.submit([1, 2, 3, 9], [CHOICE])
    assert drain(ticket) == alone([1, 2, 3, 9], CHOICE)
    assert ticket.sequence.cached == 0


def test_rows_go_on_in_any_order_and_are_computed_again_where_they_lost_their_slots() -> None:
    engine = engine_of(batch_sizes=(3,))
    rows = Rows(engine, [np.array(row) for row in ([5, 6, 7], [8], [9] * 12)])
    lists = [[5, 6, 7], [8], [9] * 12]
    assert rows.logits().argmax(-1).tolist() == [base(row) for row in lists]
    for turn, index in enumerate(([2, 0, 0], [1, 1, 1], [0, 1, 2], [2, 1, 0])):
        rows.reorder(np.array(index))
        lists = [[*lists[i], turn, n] for n, i in enumerate(index)]
        logits = rows.extend(np.array([[turn, n] for n in range(3)]), every=True)
        assert logits.argmax(-1).tolist() == [[base(row[:-1]), base(row)] for row in lists]
        others = [engine.submit([n], [CHOICE])[0] for n in range(turn + 1)]  # which take the slots
        assert [drain(ticket) for ticket in others] == [alone([n], CHOICE) for n in range(turn + 1)]
    rows.crop(3)
    lists = [[*row[:-3], 4] for row in lists]
    assert rows.extend(np.full((3, 1), 4)).argmax(-1)[:, 0].tolist() == [base(row) for row in lists]


def test_scores_are_of_every_token_in_windows() -> None:
    engine = engine_of(tokens=(16,), context=(4, 8))
    row = np.arange(40) % VOCAB
    (parts,) = log_likelihoods(engine, [row], stride=5)
    likely = [base(row[max(0, (i - 11) // 5 * 5 if i >= 16 else 0) : i].tolist()) == row[i] for i in range(1, 40)]
    assert len(parts.logprobs) == 39
    assert np.isfinite(parts.logprobs).all()
    assert parts.likeliest.tolist() == likely


def test_after_a_fault_everything_is_computed_again(monkeypatch) -> None:
    engine = engine_of()
    choice = replace(CHOICE, steps=20)
    tickets = [engine.submit([n], [choice])[0] for n in range(3)]
    answers = [[next(ticket).token for _ in range(4)] for ticket in tickets]
    run = engine.runtime.run
    monkeypatch.setattr(engine.runtime, "run", lambda step: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(engine.runtime, "run", run)
    assert [answer + drain(ticket) for answer, ticket in zip(answers, tickets, strict=True)] == [
        alone([n], choice) for n in range(3)
    ]


def test_an_error_ends_the_requests_of_its_step_alone(monkeypatch) -> None:
    engine = engine_of(batch_sizes=(1,))
    (first,) = engine.submit([1], [CHOICE])
    (second,) = engine.submit([2], [CHOICE])
    run = engine.runtime.run

    def failing(step):
        if step.arrays["tokens_bt"][0, 0] == 1:
            raise MemoryError("no room")
        return run(step)

    monkeypatch.setattr(engine.runtime, "run", failing)
    assert drain(second) == alone([2], CHOICE)
    with pytest.raises(MemoryError, match="no room"):
        next(first)


def test_uniform_numbers_are_of_seed_row_and_index_alone() -> None:
    one, two = keys(7, 2)
    draw = Draw(1.0, 5, 1.0, 0.0, 1, 8, one)
    numbers = [draw.uniform(index) for index in range(1000)]
    assert numbers == [draw.uniform(index) for index in range(1000)]
    assert numbers[::-1] == [draw.uniform(index) for index in reversed(range(1000))]
    assert len(set(numbers)) > 990
    assert abs(np.mean(numbers) - 0.5) < 0.03
    assert numbers[:5] != [replace(draw, key=two).uniform(index) for index in range(5)]
    assert keys([7, 7], 2) == [one, one]


def test_a_program_key_is_hashable_and_named() -> None:
    assert ProgramKey("score", 2, 8, 16, 4).name == "context8-b2-s16-k4-all"
