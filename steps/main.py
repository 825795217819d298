"""Run every step in turn, from a model's source to registered versions.

    mlflow run . --env-manager local
    python -m steps.main model=phi-3-mini-4k-instruct target=cuda-int4-rtn-block-32
    python -m steps.main --multirun target=cpu-int4-rtn-block-32,cpu-int4-rtn-block-32-acc-level-4

Several targets are child runs of one run, which shows them side by side.
"""

import json
from dataclasses import asdict
from typing import Any

import mlflow
from hydra.core.hydra_config import HydraConfig

from slm.children import Chain, overrides_for_children
from slm.config import Config
from slm.evaluation import comparison
from slm.evaluation.summary import next_lines, show
from slm.registry.kinds import require_registry
from slm.running.chain import of_first_target
from slm.running.command import entry_point
from slm.running.summary import CURRENT, note
from slm.running.tracking import mlflow_run
from slm.running.work import enum_value, work_folder
from slm.seal import require_key_to_sign


def main(config: Config) -> None:
    require_registry(config.register)
    require_key_to_sign(config.signing)
    choices, asked = HydraConfig.get().runtime.choices, config
    config = of_first_target(config)
    target = choices["target"] if config is asked else config.target.name
    chain = Chain(config, choices["model"], target, overrides_for_children())
    with mlflow_run("main", work_folder(config.paths.work), config.target_name) as run:
        note(run_id=run.info.run_id)
        mlflow.log_params({"model.name": config.model.name, "target.name": config.target_name})
        for link in chain.links:
            chain.run(link)
        evaluation, registration = (
            chain.children[step].outcome for step in ("evaluate", "register")
        )
        mlflow.set_tags({"verdict": evaluation.verdict, "registered": registration.uri})
        mlflow.log_metrics(
            {f"{step}.duration_s": child.duration_s for step, child in chain.children.items()}
        )
        mlflow.log_metrics(evaluation.candidate_metrics)
        mlflow.log_text(summary_of(chain), "result.json")
    rows = [
        [step, f"{child.duration_s:.1f}", ("reused " if child.reused else "") + child.outcome.uri]
        for step, child in chain.children.items()
    ]
    lines = next_lines(config.paths.work, evaluation.report, registration.uri)
    if chain.nothing_changed:
        lines = {"Nothing changed": "every outcome was reused, and no version made", **lines}
    show(rows, evaluation, registration, lines)


def summary_of(chain: Chain) -> str:
    """The outcomes of all steps, as JSON."""
    outcomes: dict[str, dict[str, Any]] = {
        step: {
            **asdict(child.outcome),
            "duration_s": child.duration_s,
            "reused": child.reused,
        }
        for step, child in chain.children.items()
    }
    return json.dumps(outcomes, indent=2, default=enum_value)


def together(config: Config) -> None:
    """Show the jobs of a --multirun side by side, and log that on their parent run."""
    told = CURRENT.get()
    assert told is not None
    rows = [comparison.row_of(job) for job in told.jobs]
    failed = f", {len([row for row in rows if row.error])} failed" if told.exit_code else ""
    found = comparison.Comparison(f"{len(rows)} packaged side by side{failed}", rows)
    comparison.publish(found, work_folder(config.paths.work) / "main")


if __name__ == "__main__":
    entry_point(main, together)
