"""What each quantizer leaves of a checkpoint: MB, closeness by kind of text, and speed.

    python -m bench.quantizers CHECKPOINT --only rtn grid
    python -m bench.quantizers CHECKPOINT --rounds 9 --texts licence=LICENSE

Exports what is not there yet, as `export_onnx` does. Each cell of a kind is the ratio of
perplexities, the mean KL divergence in nats and the top-1 agreement with the float32 checkpoint, in
windows of 512 tokens, by the runtime that serves. Decode is the bare loop's, in turns.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from bench.__main__ import Rounds, Worker, report, take_turns
from slm.config import Config
from slm.config.common import CONF, ROOT
from slm.config.packaging import WINDOW
from slm.evaluation.fidelity import compare_with_reference, write_reference
from slm.records import OnnxModel
from slm.running.tracking import settle_tracking
from slm.sources.rows import read_jsonl
from slm_pyfunc.engine.cores import available_cores
from slm_pyfunc.engine.runtime import Runtime
from steps import export_onnx

GPTQ = "target=cpu-int4-gptq-block-32-acc-level-4"
MIXED = "target=cpu-int4-mixed-acc-level-4"
QUANTIZERS = {
    "builder": ["target.quantizer=builder"],
    "rtn": [],
    "grid": ["target=cpu-int4-grid-block-32-acc-level-4"],
    "mse": [GPTQ, "target.quantizer=mse", "target.name=cpu-int4-mse-block-32-acc-level-4"],
    "gptq": [GPTQ],
    "gptq, 95.8 MB": [MIXED, "target.budget_bits=null", "target.budget_mb=95.8"],
    "mixed": [MIXED],
}
# Tokens of each kind of data/texts.jsonl: kind, languages, and how many.
KINDS = {
    "prose": ("prose", ["en"], 2048),
    "dialogue": ("dialogue", ["en"], 1536),
    "code": ("code", ["en"], 1024),
    "other languages": ("prose", ["de", "fr", "es", "zh"], 1024),
}
OTHER_TEXTS = 1024  # tokens of each file of --texts


class Checkpoint:
    """A checkpoint in transformers, in float32, as fidelity.py reads it."""

    turning_point = None

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def log_probabilities(self, tokens: list[int], last: int = 0) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0], -1).numpy()


def exported(checkpoint: Path, overrides: list[str]) -> OnnxModel:
    """What the step makes, or finds made."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [f"source={checkpoint}", *overrides]))
    assert isinstance(config, Config)
    return export_onnx.main(config)


def texts_by_kind(others: list[str]) -> dict[str, tuple[list[str], int]]:
    """Texts and the most tokens of them, by kind; `others` are name=path."""
    rows = list(read_jsonl(ROOT / "data" / "texts.jsonl"))
    texts = {
        name: ([r["text"] for r in rows if r["kind"] == kind and r["language"] in languages], most)
        for name, (kind, languages, most) in KINDS.items()
    }
    for name, path in (other.split("=", 1) for other in others):
        texts[name] = ([Path(path).read_text()], OTHER_TEXTS)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="that fetch made")
    parser.add_argument("--only", nargs="*", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--rounds", type=int, default=0, help="of decoding in turns; 0: not timed")
    parser.add_argument("--texts", nargs="*", default=[f"licence={ROOT / 'LICENSE'}"])
    arguments = parser.parse_args()
    settle_tracking()
    models: dict[str, OnnxModel] = {}
    for name in arguments.only:
        report(f"{name}: export")
        models[name] = exported(arguments.checkpoint.resolve(), QUANTIZERS[name])
    texts = texts_by_kind(arguments.texts)
    cells: dict[str, list[str]] = {name: [f"{m.size_mb:.1f}"] for name, m in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        original: Any = Checkpoint(arguments.checkpoint)
        for kind, (own, most) in texts.items():
            reference = Path(folder) / kind
            reference.mkdir()
            write_reference(original, own, "", WINDOW, most, reference)
        del original
        for name, model in models.items():
            report(f"{name}: closeness")
            runtime = Runtime(Path(model.uri))
            for kind in texts:
                found, _ = compare_with_reference(runtime.log_probabilities, Path(folder) / kind)
                keys = ("perplexity_ratio", "kl_divergence", "top1_agreement")
                ratio, divergence, agreement = (found[key] for key in keys)
                cells[name].append(f"{ratio:.3f}, {divergence:.3f}, {agreement:.2f}")
    columns = ["quantizer", "MB", *texts, "s", "peak MB", "decode tokens/s"]
    rounds: Rounds = {name: [] for name in models}
    if arguments.rounds:
        report("decode")
        threads = available_cores()
        workers = {name: Worker("bare", model.uri, threads) for name, model in models.items()}
        rounds = take_turns(workers, arguments.rounds)
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, model in models.items():
        speeds = [each["decode_tokens_per_s"] for each in rounds[name]]
        decode = f"{statistics.median(speeds):.1f}" if speeds else ""
        took = [f"{model.build_s + model.parity_s:.0f}", f"{model.peak_rss_mb:.0f}"]
        print(f"| {' | '.join([name, *cells[name], *took, decode])} |")


if __name__ == "__main__":
    main()
