"""A ladder of targets, and several targets of one command, on a tiny checkpoint.

Each step runs in this process; what measures is left out, and its figures are given by target.
"""

import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from slm.children import Chain, Child, overrides_for_children
from slm.config import Config
from slm.config.common import CONF
from slm.config.target import Objective
from slm.errors import (
    InfrastructureError,
    InputError,
    StepError,
    UnreachableError,
    UserError,
    VerdictError,
)
from slm.evaluation import comparison
from slm.evaluation.choice import Tried, best, budget_of, nearest, why
from slm.evaluation.comparison import Row, with_front
from slm.evaluation.measure import Measurement
from slm.evaluation.worker import Found
from slm.exporters import worker
from slm.records import Evaluation, LoggedModel
from slm.running.chain import Link
from slm.running.command import hydra_arguments, parameters_of, split_overrides
from slm.running.costs import Size, cost_of
from slm.running.summary import note_step, worst
from steps import choose, main
from tests.checkpoints import write_tiny, write_tokenizer
from tests.conftest import (
    MODEL,
    TINY,
    Project,
    composed,
    create_experiment,
    ended,
    made_once,
    tracking,
)

pytestmark = pytest.mark.xdist_group("choose")

A, B = "cpu-int4-rtn-block-32-acc-level-4", "cpu-int4-rtn-block-32"
# Size, decode, KL divergence: A is smaller and faster, B is closer.
FIGURES = {A: (90.0, 190.0, 0.36), B: (100.0, 60.0, 0.02), "": (540.0, 15.0, 0.0)}


class Ladder(Project):
    """A project, the tiny checkpoint that is packaged in it, and which models were measured."""

    measured: list[str] = []

    def overrides(self, *more: str) -> list[str]:
        given = f"{TINY} model.name=tiny model.source={self.folder / 'checkpoint'} "
        given += "log_pyfunc.interfaces=[chat] evaluate.gates.degenerate_share.max=1"
        return [*split_overrides(given), f"paths.work={self.folder / 'work'}", *more]

    def choose(self, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, dict[str, Any]]:
        """Run `choose` on A and B; its exit code and summary."""
        return self.command(choose.main, "choose", monkeypatch, f"ladder.targets=[{A},{B}]", *more)

    def command(
        self, step: Callable[[Config], object], name: str, patch: pytest.MonkeyPatch, *more: str
    ) -> tuple[int, dict[str, Any]]:
        self.measured.clear()
        file = self.folder / "summary.json"
        told = self.overrides(f"summary={file}", *more)
        together = main.together if name == "main" else None
        with tracking(self):
            code = ended(step, patch, *told, name=name, together=together)
            assert mlflow.active_run() is None
        return code, json.loads(file.read_text())

    def parent(self, name: str) -> mlflow.entities.Run:
        """The newest run of an entry point that is no child."""
        return next(
            run
            for run in self.client.search_runs(["1"], f"attributes.run_name = '{name}'")
            if "mlflow.parentRunId" not in run.data.tags
        )

    def artifact(self, run: mlflow.entities.Run, name: str) -> Path:
        return Path(self.client.download_artifacts(run.info.run_id, name))


@pytest.fixture(scope="module")
def ladder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        write_tiny(folder / "checkpoint", write_tokenizer(folder / "tokenizer"))
        create_experiment(folder)

    return made_once(tmp_path_factory, "ladder", make)


@pytest.fixture
def ladder(ladder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ladder]:
    """The project that these tests share: what one of them exported, the others reuse."""
    project, gates = Ladder(ladder_folder), composed().evaluate.gates | composed().model.gates

    def child(self: Chain, link: Link, inputs: dict[str, Any]) -> Child:
        start, step = time.monotonic(), importlib.import_module(f"steps.{link.step}")
        outcome = step.main(replace(self.config, **inputs))
        return Child(outcome, time.monotonic() - start, reused=False)

    def measured(model: LoggedModel, _: object, out: Path, *__: object) -> Measurement:
        project.measured.append(model.target)
        metrics = dict.fromkeys(gates, 1.0) | {"scored_tokens": 1000.0, "kl_divergence_p99": 0.0}
        size, decode, kl = FIGURES[model.target]
        metrics |= {"size_mb": size, "decode_tokens_per_s": decode, "kl_divergence": kl}
        (out / "found.json").write_text("{}")
        return Measurement(str(out), Found(metrics, answers=["", "", ""]))

    monkeypatch.setattr(Chain, "child", child)
    monkeypatch.setattr("slm.evaluation.measure.run_worker", measured)
    monkeypatch.setattr("steps.export_onnx.run_worker", worker.export)
    monkeypatch.setattr("steps.evaluate.show_answers", lambda *_: None)
    monkeypatch.setattr("slm.registry.versions.prove", lambda *_, **__: None)
    yield project
    while mlflow.active_run():
        mlflow.end_run()


def test_a_choice_that_was_interrupted_goes_on_where_it_was_to_its_registered_end(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        export = worker.export

        def interrupted(request: worker.Request) -> worker.Exported:
            if request.target.name == B:
                raise KeyboardInterrupt
            return export(request)

        patch.setattr("steps.export_onnx.run_worker", interrupted)
        code, told = ladder.choose(patch)
    assert (code, told["status"]) == (130, "interrupted")
    assert {run.info.status for run in ladder.client.search_runs(["1"])} == {"FINISHED", "KILLED"}
    code, told = ladder.choose(monkeypatch, "budget='size_mb<=100'")
    first, second = told["jobs"]
    assert (code, first["status"], second["status"]) == (0, "unchanged", "done")
    assert ladder.measured == [B]  # the checkpoint was measured once, and A
    for kind, count in {"fetch": 1, "log_transformers": 1, "measure": 3}.items():
        assert len(list((ladder.folder / "work" / kind).glob("*/"))) == count
    assert told["result"]["chosen"] == B
    names = {model.name for model in ladder.client.search_registered_models()}
    assert names == {f"tiny-{B}-chat", "tiny-transformers"}
    champion = ladder.client.get_model_version_by_alias(f"tiny-{B}-chat", "champion")
    reason = f"the closest of 2 that fit: kl_divergence 0.02; next {A} with 0.36"
    assert champion.tags["chosen"] == f"{reason} (closest on ladder cpu, budget size_mb<=100)"
    parent = ladder.parent("choose")
    assert parent.data.tags["chosen"] == B and parent.info.status == "FINISHED"
    for name in ("comparison.html", "comparison.csv", "comparison.json", "pareto.png"):
        assert ladder.artifact(parent, name).stat().st_size > 100


def test_a_choice_that_mlflow_run_began_logs_beside_the_parameters_of_that(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow logs parameters as the shell gets them, in quotes, and none may change."""
    run_id = ladder.client.create_run("1").info.run_id
    for name in parameters_of("choose"):
        ladder.client.log_param(run_id, name, "'as the shell gets it'")
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    code, _ = ladder.choose(monkeypatch, "budget='size_mb<=1'")
    run = ladder.client.get_run(run_id)
    assert code == VerdictError.exit_code, run.data.tags
    assert run.data.params["choose.budget"] == "size_mb<=1"


def test_none_that_fits_exits_with_3_and_names_what_stands_in_the_way_of_the_nearest(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(ladder.client.search_model_versions())
    code, told = ladder.choose(monkeypatch, "budget='size_mb<=80 kl_divergence<0.3'")
    assert code == 3 and told["result"]["chosen"] == ""
    assert f"nearest is {A}: budget: size_mb is 90, above 80 by 10" in told["error"]
    assert len(ladder.client.search_model_versions()) == before
    parent = ladder.parent("choose")
    assert (parent.info.status, parent.data.tags["exit_code"]) == ("FAILED", "3")
    rows = json.loads(ladder.artifact(parent, "comparison.json").read_text())["rows"]
    assert [len(row["obstacles"]) for row in rows] == [2, 1]


@pytest.fixture
def climbed(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., list[choose.Rung]]]:
    """Climb targets whose steps end as they are told to: with FIGURES, or with an error."""

    def climb(objective: Objective, *order: str, **errors: UserError) -> list[choose.Rung]:
        def run(self: Chain, link: Link) -> None:
            if link.step in errors and self.target == order[0]:
                raise errors[link.step]
            size, decode, kl = FIGURES[self.target]
            measured = evaluated(size_mb=size, decode_tokens_per_s=decode, kl_divergence=kl)
            outcomes = {"export_onnx": SimpleNamespace(size_mb=size), "evaluate": measured}
            self.children[link.step] = Child(outcomes.get(link.step), 0.0, reused=False)
            if link.step == "evaluate":
                note_step("evaluate", measured, 0.0, "new", "run")

        monkeypatch.setattr(Chain, "run", run)
        work = f"paths.work={ladder.folder / 'work'}"
        chains = [Chain(composed(work, f"target={name}"), "m", name, []) for name in order]
        with tracking(ladder), mlflow.start_run():
            return choose.climb(chains, {}, objective)

    yield climb


def test_a_target_that_cannot_be_exported_keeps_no_other_from_being_tried(
    climbed: Callable[..., list[choose.Rung]], ladder: Ladder
) -> None:
    error = StepError("no graph")
    first, second = climbed(Objective.closest, A, B, export_onnx=error)
    assert (first.row.obstacles, first.exit_code, first.tried) == (["no graph"], 1, None)
    assert second.tried and second.tried.fits
    failed = ladder.runs(A)[0]
    assert (failed.info.status, failed.data.tags["error"]) == ("FAILED", "no graph")


def test_a_target_that_lacks_memory_keeps_no_other_from_being_tried(
    climbed: Callable[..., list[choose.Rung]],
) -> None:
    first, second = climbed(Objective.closest, A, B, export_onnx=InfrastructureError("9 GB"))
    assert first.exit_code == 4 and second.tried


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("fetch", InputError("no such folder")),
        ("log_transformers", StepError("no right")),
        ("evaluate", UnreachableError("the tracking server is away")),
    ],
)
def test_what_would_fail_of_every_target_stops_the_ladder(
    step: str, error: UserError, climbed: Callable[..., list[choose.Rung]]
) -> None:
    with pytest.raises(type(error), match=str(error)):
        climbed(Objective.closest, A, B, **{step: error})


@pytest.mark.parametrize(
    ("objective", "order", "words"),
    [
        (
            Objective.smallest,
            [A, B],
            "not measured: its 100.0 MB are no less than the 90.0 of",
        ),
        (Objective.smallest, [B, A], ""),
        (Objective.cheapest, [B, A], f"not tried: {B} fits, and comes first on the ladder"),
        (Objective.closest, [A, B], ""),
        (Objective.fastest, [A, B], ""),
    ],
)
def test_an_objective_leaves_out_what_cannot_win(
    objective: Objective,
    order: list[str],
    words: str,
    climbed: Callable[..., list[choose.Rung]],
) -> None:
    first, second = climbed(objective, *order)
    assert first.tried and bool(second.tried) is not bool(words)
    assert " ".join(second.row.obstacles).startswith(words)
    assert bool(second.row.obstacles) is bool(words)


def test_a_ladder_of_which_nothing_was_measured_ends_as_its_worst_error(
    climbed: Callable[..., list[choose.Rung]],
) -> None:
    rungs = climbed(Objective.closest, A, export_onnx=InfrastructureError("9 GB"))
    error = choose.not_chosen(rungs, "target passes")
    assert (error.exit_code, str(error)) == (
        4,
        f"no target passes, for none was measured: {A}: 9 GB",
    )


def test_several_targets_are_children_of_one_run_that_shows_them_side_by_side(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = "model.gates.kl_divergence.max=0.1"
    code, told = ladder.command(main.main, "main", monkeypatch, "--target", f"{A},{B}", strict)
    assert code == 3  # A failed its gates, and B was packaged after it
    assert [(job["label"], job["verdict"], job["exit_code"]) for job in told["jobs"]] == [
        (A, "failed", 3),
        (B, "passed", 0),
    ]
    assert told["jobs"][1]["registered"]
    parent = ladder.parent("main")
    children = ladder.client.search_runs(["1"], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {run.info.run_name: run.info.status for run in children} == {A: "FAILED", B: "FINISHED"}
    assert parent.data.tags["exit_code"] == "3" and "1 of 2 failed" in parent.data.tags["error"]
    rows = json.loads(ladder.artifact(parent, "comparison.json").read_text())["rows"]
    assert [(row["name"], row["front"]) for row in rows] == [(A, False), (B, True)]
    assert ladder.artifact(parent, "pareto.png").stat().st_size > 1000
    assert "Side by side" in capsys.readouterr().out


def test_several_targets_in_a_parameter_of_mlproject_are_a_multirun() -> None:
    assert hydra_arguments("main", ["--target", "a, b", "--model", "m"]) == [
        "--multirun",
        "target=a,b",
        "model='m'",
    ]
    argv = ["--model", "m", "--overrides", "--multirun export.graph=genai,mobius"]
    assert hydra_arguments("main", argv) == ["--multirun", "model='m'", "export.graph=genai,mobius"]


def test_children_are_told_of_the_models_own_settings_and_not_of_the_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    own = ["model.name=mine", "model.source=/data/mine", "target.runtime_package=mine"]
    given = [*own, f"model={MODEL}", "budget='size_mb<=9'", "objective=fastest", "preflight=warn"]
    given.append(f"paths.work={tmp_path}")
    ended(lambda _: told.extend(overrides_for_children()), monkeypatch, *given, name="choose")
    assert told == [*own, f"paths.work={tmp_path}", "preflight=off"]


def test_the_worst_exit_code_is_that_of_a_fault_before_bad_input_and_a_verdict() -> None:
    assert worst([0, 3]) == 3 and worst([3, 4]) == 4 and worst([4, 2]) == 2
    assert worst([2, 1, 3]) == 1 and worst([]) == 0


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("cheap", "'cheap' is not <metric> <=, >=, < or > <number>"),
        ("size_mb=3", "is no budget: 'size_mb=3' is not"),
        ("size_mb<=3 and fast", "'and fast' is not"),
        (" ", "is no budget"),
        ("size_mb<=110MB", "'110MB', which is no number"),
        ("size_mb<=nan", "'nan', which is no number"),
        ("size<=3", "size is no metric; valid: loads"),
        ("size_mb<3 size_mb>=3", "no size_mb can keep all of it"),
        ("ttft_s_p50_at_7<1", "ttft_s_p50_at_7 is not measured; valid: ttft_s_p50_at_64"),
        ("hellaswag/acc>=0.4", "evaluate.harness.tasks (none) does not name"),
    ],
)
def test_a_budget_that_is_none_is_one_line_that_says_what_is_wrong(budget: str, words: str) -> None:
    with pytest.raises(InputError) as raised:
        budget_of(budget, composed().evaluate)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def evaluated(verdict: str = "passed", **metrics: float) -> Evaluation:
    measured = {"size_mb": 90.0, "decode_tokens_per_s": 100.0, "kl_divergence": 0.1} | metrics
    return Evaluation("", [], "", "", verdict, [], [], measured, {}, {}, [], "")


def test_a_condition_holds_at_its_bound_unless_it_is_strict() -> None:
    for operator, fits in {"<=": True, ">=": True, "<": False, ">": False}.items():
        budget = budget_of(f"size_mb {operator} 90", composed().evaluate)
        assert Tried.of("a", evaluated(), budget).fits is fits


def test_a_metric_that_was_not_measured_keeps_no_budget() -> None:
    budget = budget_of("load_s<=9, size_mb<=90", composed().evaluate)
    assert Tried.of("a", evaluated(), budget).obstacles == ["budget: load_s was not measured"]


def test_what_failed_its_gates_is_never_the_best_however_good() -> None:
    tried = [
        Tried("a", evaluated("failed", size_mb=1.0), []),
        Tried("b", evaluated(size_mb=3.0), []),
        Tried("c", evaluated(size_mb=3.0), []),
    ]
    for objective in Objective:
        found = best(tried, objective)
        assert found is tried[1], objective  # of equals the first, which is the cheapest
        assert "a" not in why(found, tried, objective).split()
    assert best(tried[:1], Objective.closest) is None


def test_the_nearest_is_the_one_whose_worst_miss_is_the_least() -> None:
    budget = budget_of("size_mb<=80 decode_tokens_per_s>=200", composed().evaluate)
    found = [
        Tried.of("slow", evaluated(size_mb=70.0), budget),
        Tried.of("both", evaluated(size_mb=90.0, decode_tokens_per_s=180.0), budget),
    ]
    assert nearest(found).name == "both"


def row(name: str, size: float, decode: float, kl: float, verdict: str = "passed") -> Row:
    metrics = {"size_mb": size, "decode_tokens_per_s": decode, "kl_divergence": kl}
    return Row(name, verdict, metrics)


def test_the_front_holds_what_no_other_that_passed_beats_in_all() -> None:
    rows = [
        row("small", 80, 100, 0.3),
        row("fast", 90, 150, 0.3),
        row("beaten", 90, 100, 0.3),
        row("close", 120, 100, 0.01),
        row("best, and failed", 1, 999, 0.0, "failed"),
        Row("not measured", "", {}),
    ]
    assert [r.name for r in with_front(rows) if r.front] == ["small", "fast", "close"]


def test_a_comparison_of_which_nothing_was_measured_has_a_table_and_no_plot() -> None:
    found = comparison.Comparison("none", [Row("a", "", {}, "no graph", ["no graph"])])
    assert comparison.drawn(found) is None
    assert comparison.as_csv(found).splitlines()[1] == "a,,False,False,no graph"


@pytest.mark.parametrize("file", sorted((CONF / "ladder").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_ladder_names_targets_that_exist_the_cheapest_to_make_first(file: Path) -> None:
    targets = composed(f"ladder={file.stem}").ladder.targets
    costs = [
        cost_of("export_onnx", Size(1, 2), composed(f"target={name}")).seconds for name in targets
    ]
    assert costs == sorted(costs, key=lambda seconds: seconds or 0.0)
