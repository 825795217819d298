import json
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from slm.config import Config
from slm.errors import InfrastructureError, InputError
from slm.planning import Plan, costing, places_of, plan, require_room, size_of
from slm.planning import ask as asked
from slm.running.chain import PIPELINE
from slm.running.command import split_overrides
from slm.running.costs import Cost, Size, cost_of
from slm.running.memory import left_in_cgroups
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


def test_what_was_made_for_another_target_runs_unless_all_targets_share_it(tmp_path: Path) -> None:
    config = composed(f"paths.work={tmp_path}")
    for step in ("log_transformers", "export_onnx"):
        (tmp_path / step / "1").mkdir(parents=True)
        of = {"model": config.model.name, "target": "cuda-fp16"}
        record = json.dumps({"of": of, "made": 1, "made_s": 7.0, "peak_rss_mb": 9.0})
        (tmp_path / step / "1" / "result.json").write_text(record)
    found = {
        link.step: (asked(link, config, {}), costing(link.step, config, None, places_of(config)))
        for link in PIPELINE
        if link.step in ("log_transformers", "export_onnx")
    }
    never = f"never made of {config.model.name} for {config.target.name}"
    assert found["export_onnx"][0] == ("runs", never)
    assert found["export_onnx"][1] == (Cost(), "")
    assert found["log_transformers"][0] == ("may run", "if fetch ends otherwise")
    assert found["log_transformers"][1] == (Cost(memory_gb=0.009, seconds=7.0), "as last time")


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


def file_of(folder: Path, name: str, mb: float, config: str = "") -> Path:
    """A file of zeros in a folder, and its config.json."""
    (folder / name).write_bytes(bytes(int(mb * 1e6)))
    if config:
        (folder / "config.json").write_text(config)
    return folder / name


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ('{"dtype": "float32"}', 1e-3),
        ('{"text_config": {"torch_dtype": "float32"}}', 1e-3),
        ('{"torch_dtype": "bfloat16"}', 2e-3),
        ("{}", 2e-3),
    ],
)
def test_weights_are_counted_before_they_are_brought_by_the_type_in_the_configuration(
    config: str, weights: float, tmp_path: Path
) -> None:
    file_of(tmp_path, "model.safetensors", 4, config)
    own = composed("model.name=mine", f"model.source={tmp_path}")
    assert size_of(own, None) == Size(weights, 4e-3)


@pytest.mark.parametrize(
    ("name", "weights"), [("m-Q8_0.gguf", 8e-3), ("m.q4_k_m.gguf", 8e-3), ("m.gguf", None)]
)
def test_weights_of_a_gguf_are_counted_by_its_size_and_the_type_in_its_name(
    name: str, weights: float | None, tmp_path: Path
) -> None:
    path = file_of(tmp_path, name, 8.5 if "8" in name else 4.9)
    for source in (tmp_path, path):  # the one GGUF of a folder needs no name
        size = size_of(composed("model.name=mine", f"model.source={source}"), None)
        if weights is None:
            assert size is None
        else:
            assert size is not None and size.gguf_gb == path.stat().st_size / 1e9
            assert (size.weights, size.checkpoint_gb) == pytest.approx((weights, 4 * weights))


def test_of_a_gguf_at_the_hub_the_cache_holds_the_file_and_the_checkpoint_is_no_link(
    tmp_path: Path,
) -> None:
    at_hub = f"model.source=hf://acme/m@{'0' * 40}/m-Q8_0.gguf"
    config = composed(f"paths.work={tmp_path}", "model.name=mine", at_hub, "model.parameters=8e9")
    places = {"disk_gb": tmp_path, "cache_gb": tmp_path}
    cost, _ = costing("fetch", config, size_of(config, None), places)
    assert (cost.disk_gb, cost.cache_gb) == (32, 8.5)


GB = 10**9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the machine has, in GB."""

    def has(disk: float = 100, memory: float = 100) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, int(disk * GB)))
        monkeypatch.setattr("slm.planning.available_memory_gb", lambda: memory)

    return has


@pytest.fixture
def nowhere(tmp_path: Path) -> Iterator[Path]:
    """A work folder, and a store of runs, neither of which was made yet."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(Project(tmp_path).tracking_uri)
    yield tmp_path / "work"
    mlflow.set_tracking_uri(before)


def needs(work: Path, *overrides: str) -> None:
    require_room(composed(f"paths.work={work}", *overrides), {})


PHI = ("model=phi-3-mini-4k-instruct",)  # pinned, so nothing asks the hub for it


def test_a_run_that_does_not_fit_on_the_disk_stops_with_the_step_and_the_numbers(
    nowhere: Path, machine: Callable[..., None]
) -> None:
    machine(disk=5)
    with pytest.raises(InfrastructureError) as raised:
        needs(nowhere, *PHI)
    words = str(raised.value)
    assert "fetch needs about 7.6 GB of disk in" in words and "and 5.0 GB are there" in words
    assert "preflight=warn" in words and "SLM_WORK" in words and raised.value.exit_code == 4
    machine(disk=9)  # the checkpoint fits, and what comes of it does not
    with pytest.raises(InfrastructureError, match="export_onnx needs about 11.8 GB of disk"):
        needs(nowhere, *PHI)


def test_a_run_that_does_not_fit_into_the_memory_stops_with_the_step_and_the_numbers(
    nowhere: Path, machine: Callable[..., None]
) -> None:
    machine(memory=7)
    with pytest.raises(
        InfrastructureError, match="evaluate needs about 11.3 GB of memory, and 7.0 GB are"
    ):
        needs(nowhere, *PHI)


def test_a_run_that_is_within_the_margin_goes_on_with_a_warning(
    nowhere: Path, machine: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(memory=9)  # of 11.3, less 30 %
    needs(nowhere, *PHI)
    assert "evaluate needs about 11.3 GB of memory" in caplog.text
    assert "may not suffice" in caplog.text


def test_preflight_warns_or_is_silent_as_it_is_told(
    nowhere: Path, machine: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(disk=1, memory=1)
    needs(nowhere, *PHI, "preflight=off")
    assert not caplog.text
    needs(nowhere, *PHI, "preflight=warn")
    assert "GB of disk" in caplog.text and "GB of memory" in caplog.text


def test_what_is_reused_takes_no_room(packaged: Packaged, machine: Callable[..., None]) -> None:
    machine(disk=0, memory=0)
    with tracking(packaged):
        require_room(configured(packaged), {})


def test_a_main_that_does_not_fit_starts_no_step(project: Project) -> None:
    file = project.folder / "summary.json"
    huge = "model.parameters=9e15"
    process = project.step("main", huge, f"summary={file}")
    assert process.returncode == 4, process.stderr
    assert "main: preflight: fetch needs about" in process.stderr
    assert json.loads(file.read_text())["steps"] == {}
    [run] = project.client.search_runs(["1"])
    assert (run.info.status, run.data.tags["exit_code"]) == ("FAILED", "4")
    assert not list((project.folder / "work").glob("fetch/*"))


def test_models_that_are_logged_on_the_work_folders_disk_take_none(nowhere: Path) -> None:
    """Weights are hard links there; elsewhere they are copies, of which each is counted."""
    config, size = composed(f"paths.work={nowhere}", *PHI), Size(3.8, 7.6)
    places = {**places_of(config), "store_gb": nowhere.parent / "mlruns"}
    assert costing("log_transformers", config, size, places)[0].store_gb == 0
    there = Path("/dev/shm")
    if there.is_dir():
        elsewhere = costing("log_transformers", config, size, {**places, "store_gb": there})
        assert elsewhere[0].store_gb == 7.6


@pytest.mark.parametrize(
    ("line", "files", "left"),
    [
        (
            "0::/a/b",
            {
                "a/memory.max": "4000000000",
                "a/memory.current": "1500000000",
                "a/memory.stat": "anon 1\ninactive_file 500000000\n",
                "a/b/memory.max": "max",
                "a/b/memory.current": "0",
            },
            [3.0],
        ),
        (
            "5:memory:/",
            {
                "memory/memory.limit_in_bytes": "2000000000",
                "memory/memory.usage_in_bytes": "500000000",
            },
            [1.5],
        ),
        (
            "5:cpu,memory:/",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "0",
            },
            [],
        ),
        ("", {}, []),
    ],
    ids=["version 2, of a folder above", "version 1", "version 1 without a limit", "no cgroup"],
)
def test_memory_is_bounded_by_every_cgroup_above_the_process(
    line: str, files: dict[str, str], left: list[float], tmp_path: Path
) -> None:
    placed = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": line, **placed}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert left_in_cgroups(tmp_path) == left


@pytest.mark.usefixtures("exports_here")
def test_a_step_by_itself_that_does_not_fit_makes_nothing(
    lettered: Path, project: Project, machine: Callable[..., None]
) -> None:
    machine(disk=0)
    with pytest.raises(InfrastructureError, match="export_onnx needs about .* GB of disk in"):
        project.call("export_onnx", f"source={lettered}")
    with pytest.raises(InfrastructureError, match="fetch needs about 7.6 GB of disk in"):
        project.call("fetch", *PHI)
    made = (project.folder / "work").rglob("result.json")
    assert not list(made)
    machine(disk=100)
    assert project.call("export_onnx", f"source={lettered}", "preflight=stop").size_mb > 0
