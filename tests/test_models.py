"""The architectures of conf/model, from a random checkpoint to a generated token."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm.config.common import CONF
from slm.exporters import worker
from slm.exporters.checks import require_it_generates
from slm.exporters.generation import carry_over
from slm.exporters.parity import Parity
from slm.exporters.structure import require_structure
from tests.checkpoints import write_tiny, write_tokenizer
from tests.test_fetch import fetched
from tests.test_parity import ARCHITECTURES, LONG, request_of

MODELS = [yaml.safe_load(path.read_text()) for path in sorted((CONF / "model").glob("*.yaml"))]
EXPECTED = ("licence", "architecture", "context_length", "parameters")
PHI3_128K = {
    "original_max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "longrope", **LONG},
}
# transformers' name of a configuration, and what a tiny one needs, by what config.json says.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3ForCausalLM": ("Gemma3Text", ARCHITECTURES["Gemma3Text"]),
    "Phi3ForCausalLM": ("Phi3", PHI3_128K),
    **{
        f"{name}ForCausalLM": (name, settings)
        for name, settings in ARCHITECTURES.items()
        if name not in ("Gemma3Text", "Phi3")
    },
}


@pytest.mark.parametrize("architecture", sorted({m["architecture"] for m in MODELS}))
def test_every_architecture_goes_from_fetch_to_a_generated_token(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float twins of them are compared in test_parity.py."""
    name, settings = TINY[architecture]
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows = {"vocab_size": 272}  # Qwen2's tokenizer brings a token of its own
    made = write_tiny(tmp_path / "made", tokenizer, name, **settings, **rows)
    checkpoint = fetched(made, tmp_path, architecture=architecture)
    request = replace(request_of(Path(checkpoint.uri), tmp_path), makers=["genai"])
    whole: tuple[str, Parity, dict[str, str]] = ("genai", Parity(0, 0, 0, 0, None, [], 0), {})
    monkeypatch.setattr(worker, "choose", lambda *_: whole)
    worker.export(request)
    onnx = Path(request.onnx)
    carry_over(Path(checkpoint.uri), onnx)
    require_structure(onnx, request.target)
    found = require_it_generates(onnx, Path(checkpoint.uri), request.target, request.text)
    assert found == ("cpu", 0)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["name"])
def test_every_model_says_what_to_expect_of_its_checkpoint(model: dict[str, Any]) -> None:
    assert all(model.get(key) for key in EXPECTED)
