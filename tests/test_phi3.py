"""The Phi-3 path on real weights: SmolLM2's, as a Phi3ForCausalLM checkpoint."""

import json
from pathlib import Path

from steps.evaluation.measurements import measure
from tests.conftest import TINY, Project, tracking


def test_a_phi3_checkpoint_is_fetched_exported_logged_and_close_to_its_weights(
    packaged: Project, phi3: Path, checkpoint: Path
) -> None:
    tiny = TINY.split(" model.gates")[0].split()
    own = [*tiny, "model=phi-3-mini-4k-instruct", "model.name=phi-3-smol", f"model.source={phi3}"]
    own += ["model.licence=apache-2.0", "model.context_length=8192"]
    own += ["log_pyfunc.interfaces=[chat]"]

    def run(step: str, *arguments: str) -> dict:
        process = packaged.step(step, *own, *arguments)
        assert process.returncode == 0, process.stderr[-2000:]
        return packaged.outcome(step)

    fetched = run("fetch")
    assert fetched["architecture"] == "Phi3ForCausalLM"
    onnx = run("export_onnx", f"source={fetched['uri']}")
    genai_config = json.loads((Path(onnx["uri"]) / "genai_config.json").read_text())
    assert genai_config["model"]["type"] == "phi3"
    candidate = run("log_pyfunc", f"source={onnx['uri']}")
    with tracking(packaged):
        found = measure(candidate["uri"], checkpoint.parent / "phi3", checkpoint)
    # The same weights in another architecture's layout are the same model.
    assert not found.failures
    assert found.metrics["chat_template_match"] == found.metrics["stop_token_honoured"] == 1
    assert 1 < found.metrics["perplexity_ratio"] < 1.6
    assert found.metrics["kl_divergence"] < 0.6
