"""Graphs by mobius-onnx, of ONNX Runtime's makers: architectures and rotary embeddings that
onnxruntime-genai's builder lacks. It quantizes nothing itself."""

from pathlib import Path

from slm.config.target import ExecutionProvider, Precision, Target
from slm.errors import StepError
from slm.exporters.builder import Save
from slm.sources.verify import context_length_of

HALF = "f16"
TRT_RTX = "trt-rtx"  # mobius's word
DTYPES = {Precision.fp32: "f32", Precision.fp16: HALF, Precision.bf16: "bf16"}


def make(
    checkpoint: Path, target: Target, precision: Precision, folder: Path, save: Save | None
) -> None:
    """Make the ONNX folder of a checkpoint; `save` writes its graph.

    Raises StepError if mobius does not know the architecture.
    """
    import mobius
    from mobius.integrations.ort_genai import write_ort_genai_config
    from transformers import AutoConfig

    if save is None:
        raise StepError(
            "mobius makes float graphs: its int4 is by target.quantizer=rtn, not by the builder's."
        )
    own = target.execution_provider
    provider = TRT_RTX if own is ExecutionProvider.NvTensorRtRtx else own.value
    dtype = DTYPES.get(precision, "f32" if own is ExecutionProvider.cpu else HALF)
    try:
        package = mobius.build(str(checkpoint), dtype=dtype, execution_provider=provider)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise StepError(f"mobius does not support it: {type(error).__name__}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_ort_genai_config(  # before `save`, which may add inputs that onnxruntime-genai has not
        package,
        str(folder),
        ep=provider,
        context_length=context_length_of(AutoConfig.from_pretrained(checkpoint)),
        local_config_dir=str(checkpoint),
    )
    save(package["model"], folder / "model.onnx")
