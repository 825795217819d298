"""What optimum's graphs need of the project. `make test-optimum` has what needs its environment."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from exporters.optimum.export import older_rope
from slm.config.packaging import Graph
from slm.errors import StepError
from slm.exporters import graph, optimum
from slm.exporters.gptq import unpack
from slm.exporters.parity import write_twin
from slm.exporters.structure import require_structure
from slm.exporters.worker import silent
from slm_pyfunc.engine.runtime import Runtime
from slm_pyfunc.parameters import Parameters
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import Project, composed, tracking

WIDTH, HEADS, LAYERS, CONTEXT = 64, 4, 2, 512
PAST = [f"past_key_values.{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
PRESENT = [name.replace("past_key_values", "present") for name in PAST]


class Layer(nn.Module):
    """Attention over a growing cache, and a feed-forward of two dimensions (Gemm), as OPT's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 8)  # [inputs, outputs], as GPT-2's
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Any, allowed: Any, key: Any, value: Any) -> Any:
        parts = self.attention(x).view(x.shape[0], x.shape[1], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        key, value = torch.cat([key, parts[1]], 2), torch.cat([value, parts[2]], 2)
        scores = parts[0] @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
        weighed = scores.masked_fill(~allowed, -1e9).softmax(-1) @ value
        x = x + self.out(weighed.transpose(1, 2).reshape(x.shape))
        flat = torch.addmm(torch.zeros(2 * WIDTH), x.reshape(-1, WIDTH), self.up).tanh()
        return x + self.down(flat).view(x.shape), key, value


class Decoder(nn.Module):
    """A decoder with learned positions, whose head is its embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.positions = (
            nn.Embedding(vocabulary, WIDTH),
            nn.Embedding(CONTEXT, WIDTH),
        )
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
        total = attention_mask.shape[1]
        seen = torch.arange(total)[None, :] <= torch.arange(total)[-input_ids.shape[1] :, None]
        allowed = seen[None, None] & (attention_mask[:, None, None] > 0)
        x, present = self.embedding(input_ids) + self.positions(position_ids), []
        for layer, key, value in zip(self.layers, past[::2], past[1::2], strict=True):
            x, *cache = layer(x, allowed, key, value)
            present += cache
        return x @ self.embedding.weight.T, *present

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> np.ndarray:
        whole = torch.tensor([tokens])
        empty = [torch.zeros(1, HEADS, 0, WIDTH // HEADS)] * len(PAST)
        return self(whole, torch.ones_like(whole), torch.arange(len(tokens))[None], *empty)[0][
            0
        ].numpy()


def export(decoder: Decoder, out: Path) -> None:
    """Write a decoder as optimum does: by torch's tracer, tied weights once, beside the graph."""
    caches = [torch.zeros(1, HEADS, 3, WIDTH // HEADS)] * len(PAST)
    ids, mask = torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    out.mkdir(parents=True)
    inputs = ["input_ids", "attention_mask", "position_ids", *PAST]
    axes = {name: {0: "batch", 1: "tokens"} for name in inputs[:3]}
    axes |= {name: {0: "batch", 2: "past"} for name in PAST + PRESENT}
    torch.onnx.export(
        decoder.eval(),
        (ids, mask, ids, *caches),
        str(out / "traced.onnx"),
        input_names=inputs,
        output_names=["logits", *PRESENT],
        dynamic_axes=axes,
        opset_version=18,
        dynamo=False,
    )
    model = ir.load(out / "traced.onnx")
    head = next(node for node in model.graph if node.name == "/MatMul")
    once = ir.node("Transpose", [model.graph.initializers["embedding.weight"]], {"perm": [1, 0]})
    model.graph.insert_before(head, once)
    head.replace_input_with(1, once.outputs[0])
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What optimum reads: of it the test needs configuration and tokenizer alone."""
    folder = write_tokenizer(tmp_path / "checkpoint")
    ids = json.loads((folder / "config.json").read_text())
    shape = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": CONTEXT}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape, **ids}))
    return folder


@pytest.fixture
def decoder(checkpoint: Path) -> Decoder:
    torch.manual_seed(0)
    return Decoder(json.loads((checkpoint / "config.json").read_text())["vocab_size"])


def made(
    decoder: Decoder, checkpoint: Path, quantizer: graph.Quantizer | None, to: Path
) -> Runtime:
    target = composed().target
    save = partial(graph.write, quantizer=quantizer, said=silent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimum, "run_project", lambda _, out: export(decoder, out))
        optimum.make(checkpoint, target, target.precision, to / "onnx", save)
    assert [path.name for path in to.glob("onnx*")] == ["onnx"]  # the float graph is gone
    return Runtime(to / "onnx")


def test_a_graph_whose_caches_grow_is_served_as_torch_computes_it(
    decoder: Decoder, checkpoint: Path, tmp_path: Path
) -> None:
    runtime = made(decoder, checkpoint, None, tmp_path)
    tokens = np.random.default_rng(0).integers(2, 258, 300).tolist()  # more than one piece
    log_softmax = torch.tensor(decoder.logits(tokens)).log_softmax(-1).numpy()
    np.testing.assert_allclose(runtime.log_probabilities(tokens), log_softmax, atol=1e-4)
    asked = [tokens[:280], tokens[:3], tokens[:280]]  # the last goes on from what the first left
    answers = runtime.answer(asked, Parameters(max_tokens=8, logprobs=True))
    for prompt, [answer] in zip(asked, answers, strict=True):
        for token, *_ in answer.logprobs:
            assert token == int(decoder.logits(prompt)[-1].argmax())
            prompt = [*prompt, token]


def test_every_product_of_such_a_graph_is_quantized_and_means_what_its_weights_say(
    decoder: Decoder, checkpoint: Path, tmp_path: Path
) -> None:
    rtn = graph.Rtn(4, 32)
    runtime = made(decoder, checkpoint, rtn, tmp_path)
    found = ir.load(tmp_path / "onnx" / "model.onnx").graph
    kinds = [node.op_type for node in found]
    require_structure(tmp_path / "onnx", composed("target=cpu-int4-rtn-block-32").target)
    assert kinds.count("MatMulNBits") == 4 * LAYERS + 1 and kinds.count("GatherBlockQuantized") == 1
    assert "Gemm" not in kinds and "layers.1.attention.weight_Q4" in found.initializers
    for name, weight in decoder.named_parameters():
        if weight.dim() == 2 and name != "positions.weight":
            turned = name.endswith("up")
            [(packed, scales)] = rtn.quantize(
                name, (weight.T if turned else weight).detach().numpy()
            )
            whole = (unpack(packed, 32) * scales[..., None]).reshape(len(packed), -1)
            weight.data = torch.tensor(whole.T if turned else whole, dtype=torch.float32)
    tokens = list(range(2, 100))
    log_softmax = torch.tensor(decoder.logits(tokens)).log_softmax(-1).numpy()
    np.testing.assert_allclose(runtime.log_probabilities(tokens), log_softmax, atol=1e-3)


def test_a_run_that_fails_is_one_line_and_its_log_an_artifact(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this environment, which has no optimum."""
    monkeypatch.setattr(optimum, "environment_of", lambda *_: Path(sys.executable))
    with tracking(project), mlflow.start_run() as parent:
        monkeypatch.setenv("MLFLOW_RUN_ID", parent.info.run_id)
        words = r"^ModuleNotFoundError: No module named 'optimum\S*'. All that"
        with pytest.raises(StepError, match=words) as raised:
            optimum.run_project(tmp_path, tmp_path / "out")
    [child] = project.runs("optimum")
    assert child.info.run_id in str(raised.value) and child.info.status == "FAILED"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert [file.path for file in project.client.list_artifacts(child.info.run_id)] == [optimum.LOG]


@pytest.mark.parametrize("target", ["cuda-fp16", "webgpu-int4-rtn-block-32"])
def test_optimum_is_refused_where_its_graphs_cannot_be_served(target: str, tmp_path: Path) -> None:
    wanted = composed(f"target={target}").target
    with pytest.raises(StepError, match="in float32 for the CPU alone; the target is "):
        optimum.make(tmp_path, wanted, wanted.precision, tmp_path / "onnx", lambda *_: None)


def test_a_twin_of_gpt_neo_says_of_its_own_layers_which_have_windows(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = [[["global", "local"], 2]]
    own = {"num_layers": 4, "num_hidden_layers": 4, "window_size": 96, "attention_types": whole}
    neo = write_tiny(tmp_path / "neo", checkpoint, "GPTNeo", **own)
    twin = write_twin(neo, tmp_path / "twin", "the quick brown fox " * 8, 8192)
    config = json.loads((twin.folder / "config.json").read_text())
    assert twin.lengths == {"window_size": 96} and len(twin.tokens) >= 96
    assert config["attention_types"] == [[["global"], 1], [["local"], 1]]


def test_auto_asks_no_maker_that_needs_an_environment() -> None:
    assert "optimum" not in Graph.auto.makers and Graph.optimum.makers == ["optimum"]


@pytest.mark.parametrize(
    ("rope", "older"),
    [
        ({"rope_type": "default", "rope_theta": 5.0}, {"rope_theta": 5.0, "rotary_emb_base": 5.0}),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            {
                "partial_rotary_factor": 0.5,
                "rotary_pct": 0.5,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
        ),
        ({"full_attention": {"rope_theta": 5.0}}, {}),
        (None, {}),
    ],
)
def test_rotary_settings_have_the_names_of_the_older_transformers(
    rope: dict[str, Any] | None, older: dict[str, Any]
) -> None:
    assert older_rope({"rope_parameters": rope}) == older
