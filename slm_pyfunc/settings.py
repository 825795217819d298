"""How a logged model serves: the settings that `model_config` may change at load."""

from dataclasses import dataclass

PROVIDERS = ("cpu", "cuda", "dml", "webgpu", "NvTensorRtRtx")


@dataclass
class Settings:
    """Settings of serving. Raises ValueError for a wrong value.

    `threads` is the number of intra-op threads; null takes the cores that the process may use, and
    models that take more than half of the machine's take turns. `max_batch_size` sequences are
    answered at once, `max_queue_size` more may wait. `cache_mb` (10^6 bytes) bounds the keys and
    values kept of past prompts. `context_length` may lower the model's, in tokens.
    `prompt_lookup_num_tokens` is how many tokens of an answer that is computed alone may be drafted
    from what it repeats, 0 for none.
    """

    threads: int | None = None
    max_batch_size: int = 16
    max_queue_size: int = 64
    cache_mb: float = 1024
    context_length: int | None = None
    prompt_lookup_num_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("threads", "max_batch_size", "max_queue_size", "context_length"):
            value = getattr(self, name)
            optional = value is None and name in ("threads", "context_length")
            if not optional and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        if type(drafted := self.prompt_lookup_num_tokens) is not int or not 0 <= drafted <= 64:
            raise ValueError(
                f"prompt_lookup_num_tokens is {drafted!r}; it must be an integer from 0 to 64"
            )
        if type(self.cache_mb) not in (int, float) or self.cache_mb < 0:
            raise ValueError(f"cache_mb is {self.cache_mb!r}; it must be a number of at least 0")
