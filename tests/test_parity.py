"""What a graph means beside its checkpoint, in float32: windows and rotary embeddings."""

import json
from pathlib import Path
from typing import Any

import pytest

from slm.config.packaging import Graph
from slm.errors import StepError
from slm.exporters.worker import Request, choose
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import composed

HALF = 8  # of the head's size: what a rotary embedding turns
LONG = {
    "short_factor": [1 + i / 10 for i in range(HALF)],
    "long_factor": [2 + i / 2 for i in range(HALF)],
    "original_max_position_embeddings": 4096,
    "factor": 2.0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What a configuration may ask for, beside its architecture's plain form.
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 96},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "max_position_embeddings": 512,
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            **LLAMA3,
            "original_max_position_embeddings": 256,
        }
    },
    "longrope": {
        "rope_parameters": {"rope_type": "longrope", **LONG},
        "original_max_position_embeddings": 4096,
    },
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Phi3": {"original_max_position_embeddings": 8192},
    "Mistral": {"sliding_window": None},
    "Qwen2": {"max_window_layers": 1, "use_sliding_window": True, "sliding_window": None},
    "Gemma2": {"head_dim": 16, "sliding_window": 64},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 64},
    # Has names of its own for the shape, the context length among them, and no key for these two.
    "GPT2": {"num_key_value_heads": 4, "intermediate_size": 256},
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Granite": {
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
    },
}
# Who makes a graph that means the same, with export.graph=auto; nobody is a refusal. The same table
# stands in docs/targets-and-models.md. What is missing no configuration of transformers can say.
ROPES = "linear genai, yarn mobius, dynamic genai, llama3 genai, longrope"
EXPECTED = {
    "Llama": f"plain genai, {ROPES}",
    "Phi3": "plain genai, window genai, longrope genai",
    "Mistral": f"plain genai, window genai, {ROPES}",
    "Qwen2": f"plain genai, window genai, {ROPES}",
    "Gemma2": "plain genai, linear genai, yarn, dynamic genai, llama3 genai, longrope",
    "Gemma3Text": "plain genai",
    "GPT2": "plain mobius",
    "Qwen3": "plain genai",
    "SmolLM3": "plain genai",
    "Granite": "plain genai",
}
CASES = [
    (architecture, *f"{case} ".split(" ")[:2])
    for architecture, cases in EXPECTED.items()
    for case in cases.split(", ")
]


PHI3_WINDOW = {"sliding_window": 96, "original_max_position_embeddings": 8192}


def request_of(checkpoint: Path, folder: Path, *overrides: str) -> Request:
    return Request(
        checkpoint=str(checkpoint),
        onnx=str(folder / "onnx"),
        scratch=str(folder / "scratch"),
        target=composed(*overrides).target,
        makers=Graph.auto.makers,
        text="the quick brown fox jumps over the lazy dog, and nobody knows why it does. " * 8,
        parity_tokens=8192,
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(("architecture", "asked", "maker"), CASES)
def test_a_graph_agrees_with_transformers_at_every_position_or_is_refused(
    architecture: str, asked: str, maker: str, tokenizer: Path, tmp_path: Path
) -> None:
    settings = {"initializer_range": 0.3, **ARCHITECTURES[architecture], **ASKED[asked]}
    settings = json.loads(json.dumps(settings))  # transformers writes into them
    checkpoint = write_tiny(tmp_path / "checkpoint", tokenizer, architecture, **settings)
    request = request_of(checkpoint, tmp_path)
    if not maker:
        with pytest.raises(StepError, match=asked):
            choose(request, checkpoint, tmp_path / "scratch")
        return
    chosen, parity, refused = choose(request, checkpoint, tmp_path / "scratch")
    assert (chosen, parity.first) == (maker, None), refused
    assert parity.kl_divergence < 1e-4
    assert parity.tokens > max([96, *parity_lengths(settings)])


@pytest.mark.parametrize(
    "target", ["cuda-fp16", "directml-int4-rtn-block-32", "webgpu-int4-rtn-block-32"]
)
def test_graphs_for_gpus_are_compared_on_the_cpu(
    target: str, tokenizer: Path, tmp_path: Path
) -> None:
    checkpoint = write_tiny(tmp_path / "checkpoint", tokenizer, "Phi3", **PHI3_WINDOW)
    request = request_of(checkpoint, tmp_path, f"target={target}")
    chosen, parity, refused = choose(request, checkpoint, tmp_path / "scratch")
    assert (chosen, parity.first, refused) == ("genai", None, {})


def parity_lengths(settings: dict[str, Any]) -> list[int]:
    rope = settings.get("rope_parameters", {})
    return [rope.get("original_max_position_embeddings", 0), settings.get("sliding_window") or 0]
