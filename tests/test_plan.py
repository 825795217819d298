import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from slm.config import Config
from slm.errors import InputError
from slm.planning import Plan, plan
from slm.running.command import split_overrides
from slm.running.costs import Size, cost_of
from slm.running.tracking import logged_model_exists
from slm.running.work import records
from steps.main import main
from tests.conftest import TINY, Packaged, Project, composed, tracking

pytestmark = pytest.mark.xdist_group("main")


def planned(project: Project, *overrides: str) -> Plan:
    with tracking(project):
        return plan(configured(project, *overrides))


def configured(project: Project, *overrides: str) -> Config:
    return composed(*split_overrides(TINY), *overrides, f"paths.work={project.folder / 'work'}")


def test_what_is_kept_is_reused(packaged: Packaged) -> None:
    found = planned(packaged)
    assert [step.does for step in found.steps] == ["reused"] * 6
    assert found.steps[0].why == packaged.fetched.uri and found.cost.seconds == 0


@pytest.mark.parametrize(
    ("override", "does", "why"),
    [
        (
            "export.parity_tokens=99",
            "reused runs may_run reused may_run may_run",
            "export.parity_tokens: 8192 → 99",
        ),
        ("force=log_transformers", "reused reused reused runs may_run may_run", "asked for again"),
        (
            "register.margins.size_mb.max=2",
            "reused reused reused reused reused runs",
            "register.margins.size_mb.max: 1.1 → 2.0",
        ),
        ("model.name=mine", "runs runs runs runs runs runs", "never made of mine"),
    ],
)
def test_what_differs_runs_and_what_depends_on_it_may(
    packaged: Packaged, override: str, does: str, why: str
) -> None:
    steps = planned(packaged, override).steps
    assert " ".join(step.does.replace(" ", "_") for step in steps) == does
    assert next(step.why for step in steps if step.does == "runs") == why
    cost = next(step.cost for step in steps if step.does == "runs")
    assert None not in (cost.disk_gb, cost.memory_gb, cost.seconds)


@pytest.mark.parametrize("ask", [plan, main])
def test_what_the_last_steps_would_refuse_is_refused_before_the_first(
    ask: Callable[[Config], object], tmp_path: Path
) -> None:
    public = tmp_path / "own.pub"
    public.touch()
    with pytest.raises(InputError, match="private_key is not"):
        ask(composed(f"signing.public_key={public}"))


def test_to_ask_for_a_logged_model_makes_no_store(tmp_path: Path) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(Project(tmp_path).tracking_uri)
    try:
        assert not logged_model_exists("m-1")
    finally:
        mlflow.set_tracking_uri(before)
    assert not list(tmp_path.iterdir())


def test_a_plan_leaves_nothing_behind(project: Project) -> None:
    def left() -> tuple[int, list[Path]]:
        return len(project.client.search_runs(["1"])), sorted(project.folder.rglob("*"))

    file = project.folder / "plan.json"
    file.touch()
    before = left()
    process = project.step("plan", f"summary={file}")
    assert process.returncode == 0, process.stderr
    assert "never made of smollm2-135m-instruct" in process.stdout
    assert left() == before
    assert len(json.loads(file.read_text())["result"]["steps"]) == 6


def test_figures_are_those_of_the_last_time_if_there_was_one(packaged: Packaged) -> None:
    [export] = [s for s in planned(packaged, "force=export_onnx").steps if s.step == "export_onnx"]
    last = records(packaged.folder / "work" / "export_onnx")
    assert export.basis == "as last time"
    assert export.cost.seconds in [record["made_s"] for record in last]
    assert (export.cost.memory_gb or 0) >= packaged.exported.peak_rss_mb / 1e3 - 0.01


@pytest.mark.parametrize(
    ("weights", "seconds", "memory_gb"),
    [(0.16, 13, 0.864), (1.5, 33, 1.956), (3.82, 46, 2.923), (7.25, 80, 3.445)],
)
def test_an_export_is_expected_to_take_what_one_of_its_size_took(
    weights: float, seconds: float, memory_gb: float
) -> None:
    """The shapes in docs/benchmarks.md, within a quarter."""
    cost = cost_of("export_onnx", Size(weights, 2 * weights), composed())
    assert (cost.seconds, cost.memory_gb) == pytest.approx((seconds, memory_gb), rel=0.25)
