"""The files of deploy/ and the workflow: what they name exists, and they agree with each other."""

import json
import os
import re
import shlex
import subprocess

import pytest
import yaml

from slm.config.common import ROOT
from slm.serving.service import Service, application
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
    assert ports == {int(re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)[0])}
    probes = [SERVES[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    named = {place["path"] for place in [*probes, *ROUTES.values()]}
    routes = application(Service(composed().serve)).app.routes
    assert named <= {getattr(route, "path", "") for route in routes}
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
    assert serving.keys() >= {"jinja2", "numpy", "pandas", "onnxruntime-genai", "hydra-core"}
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


def test_the_serving_container_runs_serve_as_its_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [line] = re.findall(r'^ENTRYPOINT (\["python".*\])$', DOCKERFILE, re.MULTILINE)
    python, m, module, *overrides = json.loads(line)
    assert (python, m, module) == ("python", "-m", "steps.serve")
    variables = AZURE["environment_variables"] | {e["name"]: e["value"] for e in SERVES["env"]}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = composed(*overrides, *SERVES["args"])
    assert config.model_uri == variables["MODEL_URI"] and config.follow
    assert config.serve.host == "0.0.0.0" and config.serve.settings["max_batch_size"] == 16
    assert config.port == SERVES["ports"][0]["containerPort"]
    pod, stops = SERVING_POD["terminationGracePeriodSeconds"], SERVES["lifecycle"]["preStop"]
    assert stops["sleep"]["seconds"] + config.serve.shutdown_s < pod


def test_ci_lints_every_file_of_deploy() -> None:
    assert "make lint-deploy" in (ROOT / ".ci/run").read_text()
    recipe = subprocess.check_output(["make", "--dry-run", "lint-deploy"], cwd=ROOT, text=True)
    patterns = set(re.findall(r"[\w./*-]+", recipe))
    files = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml")]
    for path in [*files, DEPLOY / "Dockerfile", *(ROOT / ".github/workflows").iterdir()]:
        name = path.relative_to(ROOT)
        assert any(name.match(pattern) or str(name.parent) == pattern for pattern in patterns), name
