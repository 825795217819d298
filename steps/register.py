"""Put what passed its evaluation into the Model Registry, and make it champion if it is no worse.

    python -m steps.register source=work/evaluate/<key>
    python -m steps.register source=runs:/<run id of evaluate>/result.json

Every logged model becomes a version: the interfaces of the ONNX model, and the checkpoint that it
was held against. Those that passed become `challenger`. Once they were loaded from the registry by
their URIs and answered, they become `champion`: if there is none, or if the measured one, the lead,
is no worse than it within `register.margins`. The other versions follow the lead.

Every write can be the last one before a kill: run again, it ends as if there had been no kill.
"""

import logging
from dataclasses import asdict
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from slm.config import Config
from slm.config.model import Gate
from slm.config.packaging import Register, Signing
from slm.errors import StepError, VerdictError
from slm.records import Evaluation, LoggedModel, RegisteredVersion, Registration
from slm.redaction import redacted
from slm.registry.names import CHALLENGER, CHAMPION, aliases_of, version_uri, version_with_alias
from slm.registry.promotion import drop_challenger, nominate, objections, settle
from slm.registry.turns import turn
from slm.registry.versions import entry_of, make_registered_models, prove_versions, version_of
from slm.running.command import entry_point
from slm.running.run import run_step
from slm.running.tracking import local_path
from slm.seal import require_signed, signed_by

log = logging.getLogger("slm.register")


def register(
    evaluation: Evaluation, settings: Register, holder: str, signing: Signing | None = None
) -> Registration:
    """Make a version of each model, unless there is one; promote them, or say why not.

    `holder` names this run among all that want to write. Raises VerdictError after a failed
    verdict, StepError if a right is missing, if a version does not answer, or if one is not signed
    as `signing` asks; nothing is written if the logged model is not.
    """
    signing = signing or Signing()
    reasons = evaluation.reasons
    if evaluation.verdict == "failed" and not settings.failed:
        raise VerdictError(f"not registered, the evaluation failed: {'; '.join(reasons)}.")
    client = MlflowClient()
    models = [LoggedModel.load(uri) for uri in (*evaluation.candidates, evaluation.reference)]
    require_signed([model.uri for model in models], signing)
    entries = [entry_of(model, evaluation, settings, signed_by(signing)) for model in models]
    names = make_registered_models(client, entries, holder)
    passed = evaluation.verdict == "passed"
    with turn(client, names, holder):
        versions = [version_of(client, entry) for entry in entries]
        for version in versions if passed else []:
            nominate(client, version)
    if passed:
        try:
            own_files = [v for v, m in zip(versions, models, strict=True) if v.source != m.uri]
            require_signed([version_uri(version) for version in own_files], signing)
            prove_versions(client, versions, evaluation, signing.public_key)
        except StepError:
            with turn(client, names, holder):
                for version in versions:
                    drop_challenger(client, version)
            raise
        with turn(client, names, holder):
            reasons = settle(client, versions, evaluation, settings.margins)
    return registration(client, versions, evaluation.verdict, reasons)


def registration(
    client: MlflowClient, versions: list[ModelVersion], verdict: str, reasons: list[str]
) -> Registration:
    """The outcome, with the aliases as they are now."""
    made = []
    for version in versions:
        aliases = aliases_of(client, version.name) if verdict == "passed" else {}
        held = [a for a in (CHAMPION, CHALLENGER) if aliases.get(a) == str(version.version)]
        made.append(RegisteredVersion(version.name, str(version.version), held[0] if held else ""))
    lead = made[0]
    states = {CHAMPION: "is champion", CHALLENGER: "stays challenger", "": "gets no alias"}
    words = "; ".join([f"version {lead.version} {states[lead.alias]}", *reasons])
    log.info("register: %s %s", lead.name, words.replace(";", ":", 1))
    promoted = lead.alias == CHAMPION
    ending = f"@{CHAMPION}" if promoted else f"/{lead.version}"
    return Registration(f"models:/{lead.name}{ending}", verdict, made, promoted, reasons)


def changed(registration: Registration, evaluation: Evaluation, margins: dict[str, Gate]) -> str:
    """In words, what in the registry is no longer as the outcome says; "" for nothing.

    A version that passed and is not champion is registered again once something else, or nothing,
    keeps it from that.
    """
    client = MlflowClient()
    for made in registration.versions:
        try:
            client.get_model_version(made.name, made.version)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return f"{made.name} version {made.version} is gone"
            raise
        if made.alias and aliases_of(client, made.name).get(made.alias) != made.version:
            return f"alias {made.alias} of {made.name} was moved"
    if registration.promoted or registration.verdict != "passed":
        return ""
    made = registration.versions[0]
    lead = client.get_model_version(made.name, made.version)
    champion = version_with_alias(client, lead.name, CHAMPION)
    if champion is not None and champion.version == lead.version:
        return f"version {lead.version} is champion by now"
    reasons = objections(lead, champion, evaluation, margins)
    if reasons == registration.reasons:
        return ""
    return "; ".join(reasons) or f"nothing keeps version {lead.version} from becoming champion"


def main(config: Config) -> Registration:
    evaluation = Evaluation.read(local_path(config.source, "source", "evaluate"))

    def make(_: Path) -> Registration:
        run = mlflow.active_run()
        assert run is not None
        return register(evaluation, config.register, run.info.run_id, config.signing)

    return run_step(
        "register",
        config,
        Registration,
        key={
            "evaluation": evaluation.json(),
            "register": asdict(config.register),
            "signed_by": signed_by(config.signing),
            "registry": redacted(mlflow.get_registry_uri()),
        },
        make=make,
        stale=lambda made: changed(made, evaluation, config.register.margins),
    )


if __name__ == "__main__":
    entry_point(main)
