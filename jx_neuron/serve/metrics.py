"""Metrics under vLLM's names, which dashboards, autoscalers and llm-d read.

https://docs.vllm.ai/en/latest/design/metrics.html
"""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jx_neuron.serve.async_engine import AsyncEngine
from jx_neuron.serve.settings import ServerSettings
from jx_neuron.serve.stream import Timings

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
ANSWERS = (1, 2, 5, 10, 20)
GAUGES = (
    ("num_requests_running", "running", "Answers with a slot."),
    ("num_requests_waiting", "waiting", "Answers without a slot yet."),
    ("kv_cache_usage_perc", "kv_cache_usage", "Share of the slots that are taken; 1 is all."),
    ("programs_to_load", "to_load", "Programs yet to be compiled; answers are slower until there are none."),
)
COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Tokens of prompts."),
    ("generation_tokens", "generation_tokens", "Tokens of answers."),
    ("num_preemptions", "preemptions", "Answers that lost their slot and were computed again."),
    ("prefix_cache_queries", "prefix_queries", "Tokens of prompts that were looked for in slots."),
    ("prefix_cache_hits", "prefix_hits", "Tokens of prompts that were found in slots."),
)
HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", FIRST_TOKEN),
    "inter_token_latency_seconds": ("From one token of an answer to the next.", BETWEEN),
    "request_time_per_output_token_seconds": ("Mean time of a token after the first.", BETWEEN),
    "e2e_request_latency_seconds": ("From a request's arrival to its last token.", WHOLE),
    "request_queue_time_seconds": ("From a request's arrival to its slot.", WHOLE),
    "request_prefill_time_seconds": ("From a request's slot to its first token.", WHOLE),
    "request_decode_time_seconds": ("From a request's first token to its last.", WHOLE),
    "request_inference_time_seconds": ("From a request's slot to its last token.", WHOLE),
    "request_prompt_tokens": ("Tokens of a request's prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", TOKENS),
    "request_params_n": ("n of a request.", ANSWERS),
    "request_params_max_tokens": ("Most tokens of an answer, by the request.", TOKENS),
}
LABELS = ("model_name", "engine")


class _Load:
    """The engine's own numbers, read when they are scraped."""

    def __init__(self, engine: AsyncEngine, prefix: str, labels: Sequence[str]):
        self._engine, self._prefix, self._labels = engine, prefix, labels

    def collect(self) -> Iterator[Metric]:
        """The gauges and counters."""
        stats = self._engine.stats()
        for name, field, text in GAUGES:
            gauge = GaugeMetricFamily(self._prefix + name, text, labels=LABELS)
            gauge.add_metric(self._labels, getattr(stats, field))
            yield gauge
        for name, field, text in COUNTERS:
            counter = CounterMetricFamily(self._prefix + name, text, labels=LABELS)
            counter.add_metric(self._labels, getattr(stats, field))
            yield counter


class Metrics:
    """The metrics of a server, in a registry of their own.

    model_max_len: most tokens of a sequence; `slots`: sequences at a time. A slot is a block of vLLM's.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings, cache: Mapping[str, int]):
        self.registry = CollectorRegistry()
        prefix, labels = settings.metrics_prefix, (settings.names[0], "0")
        self.registry.register(_Load(engine, prefix, labels))
        self._histograms = {
            name: Histogram(prefix + name, text, LABELS, buckets=buckets, registry=self.registry).labels(*labels)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        success = Counter(
            prefix + "request_success", "Answers that ended.", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._success = {reason: success.labels(*labels, reason) for reason in ("stop", "length")}
        cached = Counter(
            prefix + "prompt_tokens_cached", "Tokens of prompts found in slots.", LABELS, registry=self.registry
        )
        self._cached = cached.labels(*labels)
        info = Info(prefix + "cache_config", "Slots: as many blocks as long as a sequence.", registry=self.registry)
        info.info({"block_size": str(cache["model_max_len"]), "num_gpu_blocks": str(cache["slots"])})

    def gap(self, seconds: float) -> None:
        """Observes the time from one token of an answer to the next."""
        self._histograms["inter_token_latency_seconds"].observe(seconds)

    def ended(self, reason: str, tokens: int) -> None:
        """Counts an answer of this number of tokens."""
        self._success[reason].inc()
        self._histograms["request_generation_tokens"].observe(tokens)

    def finished(self, timings: Timings, prompt_tokens: int, tokens: int, n: int, max_tokens: int | None) -> None:
        """Observes the stages of a request whose last answer has ended."""
        arrived, started, first = timings.arrived, timings.started, timings.first_token
        if started is None or first is None or timings.finished is None:
            return
        end = timings.finished
        observed = dict(
            time_to_first_token_seconds=first - arrived,
            e2e_request_latency_seconds=end - arrived,
            request_queue_time_seconds=started - arrived,
            request_prefill_time_seconds=first - started,
            request_decode_time_seconds=end - first,
            request_inference_time_seconds=end - started,
            request_prompt_tokens=prompt_tokens,
            request_params_n=n,
        )
        if tokens > 1:
            observed["request_time_per_output_token_seconds"] = (end - first) / (tokens - 1)
        if max_tokens is not None:
            observed["request_params_max_tokens"] = max_tokens
        for name, value in observed.items():
            self._histograms[name].observe(max(value, 0))
        self._cached.inc(timings.cached_tokens)

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self.registry)
