"""The Phi-3 path on real weights: SmolLM2's, as a Phi3ForCausalLM checkpoint."""

import json
from pathlib import Path

from tests.conftest import TINY, Project


def test_a_phi3_checkpoint_is_fetched_exported_and_evaluated(packaged: Project, phi3: Path) -> None:
    tiny = TINY.split(" model.gates")[0].split()
    own = [*tiny, "model=phi-3-mini-4k-instruct", "model.name=phi-3-smol", f"model.source={phi3}"]
    own += ["model.licence=apache-2.0", "model.context_length=8192"]
    own += ["log_pyfunc.interfaces=[chat]"]
    gates = "perplexity_ratio:{max:3},kl_divergence:{max:2},top1_agreement:{min:0.2}"
    own += [f"+model.gates={{{gates}}}"]

    def run(step: str, *arguments: str) -> dict:
        process = packaged.step(step, *own, *arguments)
        assert process.returncode == 0, process.stderr[-2000:]
        return packaged.outcome(step)

    checkpoint = run("fetch")
    assert checkpoint["architecture"] == "Phi3ForCausalLM"
    onnx = run("export_onnx", f"source={checkpoint['uri']}")
    genai_config = json.loads((Path(onnx["uri"]) / "genai_config.json").read_text())
    assert genai_config["model"]["type"] == "phi3"
    candidate = run("log_pyfunc", f"source={onnx['uri']}")
    reference = run("log_transformers", f"source={checkpoint['uri']}")
    evaluation = run("evaluate", f"candidate={candidate['uri']}", f"reference={reference['uri']}")
    assert evaluation["verdict"] == "passed", evaluation["reasons"]
    # The same weights in another architecture's layout are the same model.
    llama = packaged.made["evaluate"]["candidate_metrics"]
    assert abs(evaluation["candidate_metrics"]["perplexity"] / llama["perplexity"] - 1) < 0.05
