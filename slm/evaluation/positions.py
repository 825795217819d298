"""Where a model reads otherwise than before: past its sliding window, or where its rope changes.

A text must be longer than that to show a fault of it.
"""

from typing import Any

from slm.sources.verify import context_length_of

LIMIT = 8192  # tokens; what begins later is not scored
SWITCHING = ("longrope", "dynamic")  # types of rope whose frequencies change with the length


def turning_point(config: Any) -> int | None:
    """The last length, up to LIMIT and within the context, beyond which a model reads otherwise.

    `config` is transformers' configuration of the model.
    """
    context = context_length_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one a layer type
    points = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
    points += [
        one.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for one in ropes
        if one.get("rope_type") in SWITCHING
    ]
    return max(
        (point for point in points if point and point < min(LIMIT + 1, context)), default=None
    )
