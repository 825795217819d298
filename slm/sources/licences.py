"""The licence that a source states, held against the one expected and those allowed."""

from slm.config.model import Fetch, Model
from slm.errors import InputError


def require_licence(stated: str | None, *, model: Model, settings: Fetch, where: str) -> None:
    """Raise unless a licence is the one that `model` expects, and one of those allowed.

    `stated` is None where the source states none: then it is what `model` says.
    """
    licence = model.licence or stated
    if licence and stated and stated.lower() != licence.lower():
        raise InputError(
            f"{where} says its licence is {stated}; model.licence expects {model.licence}."
        )
    allowed = settings.allowed_licences
    if allowed is None or (licence or "").lower() in map(str.lower, allowed):
        return
    valid = ", ".join(allowed) or "none"
    if licence is None:
        raise InputError(
            f"{where} states no licence, and fetch.allowed_licences allows {valid}. If you know "
            "it, set model.licence."
        )
    raise InputError(
        f"the licence of {where} is {licence}; fetch.allowed_licences allows {valid}. Take another "
        "model, or ask who keeps that list."
    )
