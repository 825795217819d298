"""What /metrics tells Prometheus."""

from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SPEEDS = (1, 2, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The metrics of one server, all of them by model."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"slm_{name}", words, ["model", *labels], registry=self.registry)

        def gauge(name: str, words: str, *labels: str) -> Gauge:
            return Gauge(f"slm_{name}", words, ["model", *labels], registry=self.registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"slm_{name}", words, ["model"], buckets=buckets, registry=self.registry
            )

        self.requests = counter("requests", "Requests, by how they ended", "route", "status")
        self.running = gauge("sequences_running", "Sequences that are being answered")
        self.waiting = gauge("sequences_waiting", "Sequences in the queue")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts out of the cache")
        self.cache_hits = counter("cache_hits", "Requests whose prompt began in the cache")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers")
        self.first_token = histogram("time_to_first_token_seconds", "From the request", SECONDS)
        self.duration = histogram("request_seconds", "Until the answer was whole", SECONDS)
        self.speed = histogram("tokens_per_second", "Of one choice, after its first token", SPEEDS)
        self.version = gauge("model_info", "The version that is served", "version")
        self.failures = counter("follow_failures", "Tries to take up a new version that failed")

    def count_sequences(self, runtimes: dict[str, Any]) -> None:
        """Set the gauges of the queue; interfaces that share one are counted under the first."""
        self.running.clear()
        self.waiting.clear()
        counted = []
        for name, runtime in runtimes.items():
            if runtime is None or not runtime.loaded or runtime in counted:
                continue
            counted.append(runtime)
            self.running.labels(name).set(len(runtime.scheduler.open))
            self.waiting.labels(name).set(len(runtime.scheduler.waiting))

    def page(self) -> bytes:
        return generate_latest(self.registry)
