"""The Phi-3 path on real weights: SmolLM2's, as a Phi3ForCausalLM checkpoint."""

import json
from pathlib import Path

import pytest

from slm.evaluation.measure import Measurement, Measuring
from slm.evaluation.worker import measure_candidate
from slm.running.command import split_overrides
from tests.conftest import TINY, Packaged, folder_of


@pytest.mark.usefixtures("exports_here")
def test_a_phi3_checkpoint_is_fetched_exported_logged_and_close_to_its_weights(
    packaged: Packaged, phi3: Path, measuring: Measuring, measured_checkpoint: Measurement
) -> None:
    tiny = split_overrides(TINY.split(" model.gates")[0])
    own = [*tiny, "model=phi-3-mini-4k-instruct", "model.name=phi-3-smol", f"model.source={phi3}"]
    own += ["model.licence=apache-2.0", "model.context_length=8192"]
    own += ["log_pyfunc.interfaces=[chat]"]
    fetched = packaged.call("fetch", *own)
    assert fetched.architecture == "Phi3ForCausalLM"
    onnx = packaged.call("export_onnx", *own, f"source={fetched.uri}")
    genai_config = json.loads((Path(onnx.uri) / "genai_config.json").read_text())
    assert genai_config["model"]["type"] == "phi3"
    logged = packaged.call("log_pyfunc", *own, f"source={onnx.uri}")
    folder, reference = folder_of(packaged, logged.models[0]), Path(measured_checkpoint.uri)
    found = measure_candidate(str(folder), measuring.request, reference)
    # The same weights in another architecture's layout are the same model.
    assert not found.failures
    assert found.metrics["chat_template_match"] == found.metrics["stop_token_honoured"] == 1
    expected = packaged.evaluation.candidate_metrics
    for metric in ("perplexity_ratio", "kl_divergence", "top1_agreement"):
        assert found.metrics[metric] == pytest.approx(expected[metric], rel=0.1)
