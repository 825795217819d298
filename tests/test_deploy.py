"""The files of deploy/ and the workflow: what they name exists, and they agree with each other."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml
from mlflow.pyfunc import scoring_server

from deploy.serve_model import PORT, serve_model
from slm.config import ROOT
from tests.conftest import composed

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/package.yml").read_text())
KUBERNETES = {
    document["kind"]: document["spec"]
    for path in (DEPLOY / "kubernetes").iterdir()
    for document in yaml.safe_load_all(path.read_text())
}
CRON_POD = KUBERNETES["CronJob"]["jobTemplate"]["spec"]["template"]["spec"]
SERVING_POD = KUBERNETES["Deployment"]["template"]["spec"]
AZURE = yaml.safe_load((DEPLOY / "azureml/deployment.yml").read_text())
ROUTES = AZURE["environment"]["inference_config"]
[PACKAGES], [SERVES] = CRON_POD["containers"], SERVING_POD["containers"]


def workflow_command() -> list[str]:
    [line] = [
        line
        for step in WORKFLOW["jobs"]["package"]["steps"]
        for line in step.get("run", "").splitlines()
        if "steps.main" in line
    ]
    return shlex.split(line.partition("|")[0])


@pytest.mark.parametrize("command", [PACKAGES["command"] + PACKAGES["args"], workflow_command()])
def test_a_schedule_runs_an_entry_point_with_its_parameters(command: list[str]) -> None:
    entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    parameters = entry_points[command[2].removeprefix("steps.")]["parameters"]
    flags = {word.removeprefix("--") for word in command if word.startswith("--")}
    assert command[:2] == ["python", "-m"] and flags and flags <= parameters.keys()


def test_the_volume_of_a_schedule_is_bounded() -> None:
    [cleans] = CRON_POD["initContainers"]
    assert cleans["command"][:3] == ["python", "-m", "steps.clean"]
    volume = KUBERNETES["PersistentVolumeClaim"]["resources"]["requests"]["storage"]
    bound = composed(*cleans["command"][3:]).clean.max_gb
    assert bound is not None and bound < int(volume.removesuffix("Gi"))
    assert cleans["volumeMounts"] == PACKAGES["volumeMounts"]


def test_what_is_packaged_is_what_is_served() -> None:
    given = dict(zip(PACKAGES["args"][::2], PACKAGES["args"][1::2], strict=True))
    config = composed(f"model={given['--model']}", f"target={given['--target']}")
    [uri] = [entry["value"] for entry in SERVES["env"] if entry["name"] == "MODEL_URI"]
    assert uri == f"models:/{config.model.name}-{config.target.name}-chat@champion"


def test_images_are_targets_of_the_dockerfile_and_of_one_version() -> None:
    targets = set(re.findall(r"^FROM .* AS (\S+)$", DOCKERFILE, re.MULTILINE))
    readme = (DEPLOY / "README.md").read_text()
    images = {
        "packaging": PACKAGES["image"],
        "serving": SERVES["image"],
        "baked": AZURE["environment"]["image"],
    }
    for target, image in images.items():
        assert target in targets
        assert re.search(rf"--target {target} .*-t {re.escape(image)} ", readme)
    assert len({image.rpartition(":")[2] for image in images.values()}) == 1


def test_all_agree_on_the_port_the_paths_and_the_user() -> None:
    ports = {SERVES["ports"][0]["containerPort"], *(route["port"] for route in ROUTES.values())}
    assert ports == {PORT} == {int(re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)[0])}
    probes = [SERVES[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    named = {place["path"] for place in [*probes, *ROUTES.values()]}
    assert named <= {
        getattr(route, "path", "") for route in scoring_server.init(MagicMock()).routes
    }
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[0]
    for pod in (CRON_POD, SERVING_POD):
        context = pod["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))


def selected(stage: str) -> list[str]:
    """The requirements that a stage of the Dockerfile installs, by its own command."""
    command = DOCKERFILE.partition(f"AS {stage}-environment")[2]
    command = re.search(r"(sed .*?requirements\.txt) >", command, re.DOTALL)[1]  # type: ignore[index]
    environment = {**os.environ, "RUNTIME": "onnxruntime-genai"}
    text = subprocess.check_output(["sh", "-c", command], cwd=ROOT, env=environment, text=True)
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_serving_takes_its_pins_from_the_requirements_and_no_torch() -> None:
    pins = dict(line.split("==") for line in selected("packaging"))
    serving = dict(line.split("==") for line in selected("serving"))
    assert serving.pop("mlflow-skinny") == pins["mlflow"]
    assert serving.keys() == {"jinja2", "numpy", "pandas", "onnxruntime-genai"}
    assert serving.items() <= pins.items() and "torch" in pins and "pytest" not in pins


def test_the_build_context_holds_what_the_steps_need_and_nothing_else() -> None:
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert all((ROOT / name).exists() for name in kept)
    assert kept >= {"MLproject", "conda.yaml", "conf", "data", "exporters"}
    assert kept >= {"slm", "slm_pyfunc", "steps"}
    assert not {".git", ".venv", "tests", "mlruns", "work"} & kept


def test_the_server_takes_the_place_of_process_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda *call: calls.append(call))
    serve_model(str(tmp_path), workers=1)
    [(program, arguments, environment)] = calls
    assert program == arguments[0] == "uvicorn"
    assert shlex.join(arguments).startswith(f"uvicorn --host 0.0.0.0 --port {PORT} --workers 1 ")
    assert tmp_path.as_uri() in environment.values()


def test_ci_lints_every_file_of_deploy() -> None:
    assert "make lint-deploy" in (ROOT / ".ci/run").read_text()
    recipe = subprocess.check_output(["make", "--dry-run", "lint-deploy"], cwd=ROOT, text=True)
    patterns = set(re.findall(r"[\w./*-]+", recipe))
    files = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml")]
    for path in [*files, DEPLOY / "Dockerfile", *(ROOT / ".github/workflows").iterdir()]:
        name = path.relative_to(ROOT)
        assert any(name.match(pattern) or str(name.parent) == pattern for pattern in patterns), name
