"""Each sequence through onnxruntime-genai's Generator, with any execution provider."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from .decoder import (
    LONGROPE_SWITCH,
    ExecutionProviderUnavailable,
    Row,
    capacity_for,
    common,
    has_longrope,
)

# Packages that bring an execution provider, by its name; others are built into the runtime.
PLUGINS = {
    "webgpu": "onnxruntime_ep_webgpu",
    "NvTensorRtRtx": "onnxruntime_ep_nv_tensorrt_rtx",
}


class GeneratorDecoder:
    """Each sequence in a Generator of its own, one after the other; any execution provider.

    A finished Generator is kept and rewound to where the next prompt agrees with it.
    """

    takes_drafts = False

    def __init__(
        self,
        folder: Path,
        genai_config: dict[str, Any],
        provider: str,
        threads: int,
        cache_mb: float,
    ) -> None:
        register_plugin(provider)
        config = og.Config(str(folder))
        config.clear_providers()
        if provider != "cpu":
            config.append_provider(provider)
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        try:
            self.model = og.Model(config)
        except RuntimeError as error:
            if provider == "cpu":
                raise
            package = PLUGINS.get(provider, "").replace("_", "-")
            hint = f" (its package is {package})" if package else ""
            raise ExecutionProviderUnavailable(
                f"{provider}: {' '.join(str(error).split())}{hint}"
            ) from error
        decoder = genai_config["model"]["decoder"]
        values = (
            decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        )
        self.bytes_per_token = 2 * 4 * values
        self.budget = int(cache_mb * 1e6)
        self.longrope = has_longrope(genai_config)
        self.pad: int = genai_config["model"].get("pad_token_id", 0)
        self.kept: list[Row] = []  # the least recently used first

    def open(self, prompt: list[int], length: int) -> Row:
        end = len(prompt) - 1
        if self.longrope and length > LONGROPE_SWITCH:
            end = 0
        fitting = [
            (shared, row)
            for row in self.kept
            # Rewinding loses the rest of what was kept: not for a short beginning.
            if (shared := common(prompt[:end], row.tokens)) > len(row.tokens) / 2
            and row.state[1] >= length
        ]
        if fitting:
            shared, best = max(fitting, key=lambda pair: pair[0])
            self.kept.remove(best)
            best.state[0].rewind_to(shared)
            return Row(prompt[:shared], len(prompt), best.state)
        capacity = capacity_for(length)
        return Row([], len(prompt), (self.generator(capacity), capacity))

    def extend(self, row: Row, tokens: list[int]) -> np.ndarray:
        generator, before = row.state[0], len(row.tokens)
        row.tokens += tokens
        if self.longrope and 0 < before <= LONGROPE_SWITCH < len(row.tokens):
            generator.rewind_to(0)  # the factors of all positions change
            tokens = row.tokens
        generator.append_tokens(tokens)
        if tokens[-1] == self.pad:  # genai 0.18 then gives the logits before it, as of a padded row
            return generator.get_output("logits")[0, -1].astype(np.float32)
        return generator.get_logits().reshape(-1)

    def step(self, rows: list[Row], tokens: list[int]) -> list[np.ndarray | Exception]:
        logits: list[np.ndarray | Exception] = []
        for row, token in zip(rows, tokens, strict=True):
            try:
                logits.append(self.extend(row, [token]))
            except Exception as error:
                logits.append(error)
        return logits

    def extend_by_draft(self, row: Row, tokens: list[int]) -> np.ndarray:
        raise NotImplementedError

    def close(self, row: Row) -> None:
        if not row.tokens or row.state[1] * self.bytes_per_token > self.budget:
            return
        self.kept.append(row)
        while sum(kept.state[1] for kept in self.kept) * self.bytes_per_token > self.budget:
            self.kept.pop(0)

    def clear(self) -> None:
        """Rows are Generators of their own: nothing is left of them."""

    def score(self, tokens: list[int], prompt: int | None = None) -> np.ndarray:
        generator = self.generator(len(tokens) + 1)
        generator.append_tokens(tokens)
        return generator.get_output("logits")[0].astype(np.float32)

    def generator(self, max_length: int) -> Any:
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=max_length)
        return og.Generator(self.model, parameters)


def register_plugin(provider: str) -> None:
    """Tell onnxruntime-genai where a provider's library is, if a package that is installed has it.

    It is told once in a process, also by several versions of this code: onnxruntime-genai 0.18
    crashes after a second time.
    """
    if provider not in PLUGINS:
        return
    try:
        plugin = importlib.import_module(PLUGINS[provider])
    except ImportError:  # the runtime may have it built in
        return
    if not hasattr(plugin, "registered_with_genai"):
        og.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        plugin.registered_with_genai = True  # type: ignore[attr-defined]
