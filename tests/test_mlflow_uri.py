"""Checkpoints that a training job logged to MLflow, in its own store or on another server."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from slm.config.model import Model
from slm.digests import read_provenance
from slm.errors import InputError
from slm.records import Checkpoint
from slm.registry.versions import Entry, make_version, provenance_tags
from slm.sources.mlflow_uri import of_run
from slm.sources.resolve import Source, resolve
from tests.conftest import Project, create_experiment, tracking
from tests.servers import Server


@dataclass(frozen=True)
class Trained(Project):
    """A store in which a training run logged a checkpoint in several ways."""

    run_id: str = ""
    model: str = ""  # the URI of the logged model of the transformers flavor
    adapter: str = ""  # the same with a LoRA adapter

    def fetch(self, source: str) -> Checkpoint:
        return self.call("fetch", "model.name=m", f"model.source={source}")


@pytest.fixture(scope="module")
def trained(lettered: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("training")
    create_experiment(folder)
    model = AutoModelForCausalLM.from_pretrained(lettered)
    parts = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(lettered)}
    told = {"task": "text-generation", "pip_requirements": ["mlflow"]}
    with tracking(Project(folder)), mlflow.start_run() as run:
        logged = mlflow.transformers.log_model(
            parts, name="chat", registered_model_name="trained", **told
        )
        mlflow.log_artifacts(str(lettered), "checkpoint")
        parts["model"] = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        adapter = mlflow.transformers.log_model(
            parts, name="lora", base_model_path=str(lettered), **told
        )
        MlflowClient().set_registered_model_alias("trained", "best", "1")
    return Trained(folder, run.info.run_id, logged.model_uri, adapter.model_uri)


def test_an_alias_becomes_its_version_and_the_weights_the_checkpoint_that_was_logged(
    trained: Trained, lettered: Path
) -> None:
    fetched = trained.fetch("models:/trained@best")
    assert fetched.source == "models:/trained/1"
    assert set(fetched.files) == {path.name for path in lettered.iterdir()}
    from_file = read_provenance(lettered).files["model.safetensors"]
    assert fetched.files["model.safetensors"] == from_file


@pytest.mark.parametrize("source", ["models:/trained/1", "{model}", "runs:/{run}/chat"])
def test_one_logged_model_is_the_same_content_by_each_of_its_uris(
    trained: Trained, source: str
) -> None:
    by_alias = trained.fetch("models:/trained@best")
    fetched = trained.fetch(source.format(model=trained.model, run=trained.run_id))
    assert (fetched.revision, fetched.files) == (by_alias.revision, by_alias.files)


def test_a_folder_of_a_run_is_the_revision_of_the_same_local_folder(
    trained: Trained, lettered: Path
) -> None:
    fetched = trained.fetch(f"runs:/{trained.run_id}/checkpoint")
    local = resolve(str(lettered), Model(name="m", source=str(lettered)))
    assert fetched.revision == local.revision


def test_one_byte_makes_another_source(trained: Trained, tmp_path: Path) -> None:
    folder = shutil.copytree(trained.folder, tmp_path / "copy")
    [weights] = (folder / "mlruns").glob("*/artifacts/checkpoint/model.safetensors")

    def source() -> Source:
        store = f"sqlite:///{folder / 'mlflow.db'}"
        with tracking(Project(folder)), mlflow.start_run() as run:
            mlflow.log_artifacts(str(weights.parent), "checkpoint")
        uri = f"runs:/{run.info.run_id}/checkpoint"
        return resolve(uri, Model(name="m", source=uri, tracking_uri=store))

    before = source()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert source().identity["files"] != before.identity["files"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("models:/trained/9", r"models:/trained/9 does not exist"),
        ("models:/trained@none", r"models:/trained@none does not exist"),
        ("models:/trained/latest", r"is none of models:/name/version, .*its version is a number"),
        ("runs:/0123/checkpoint", r"runs:/0123/checkpoint does not exist"),
        ("runs:/{run}/nothing", r"holds no files"),
        ("{adapter}", r"is an adapter, not a checkpoint: write model\.adapter=models:/m-"),
    ],
)
def test_what_is_not_a_checkpoint_in_mlflow_is_one_clear_line(
    trained: Trained, source: str, words: str
) -> None:
    uri = source.format(run=trained.run_id, adapter=trained.adapter)
    with pytest.raises(InputError, match=words):
        resolve(uri, Model(name="m", source=uri, tracking_uri=trained.tracking_uri))


def test_a_store_that_does_not_exist_is_named_and_not_made(tmp_path: Path) -> None:
    uri, store = "models:/trained/1", f"sqlite:///{tmp_path / 'no.db'}"
    with pytest.raises(InputError, match=r"no\.db, which does not exist\. Set MLFLOW_TRACKING_URI"):
        resolve(uri, Model(name="m", source=uri, tracking_uri=store))
    assert not list(tmp_path.iterdir())


def test_a_registry_that_does_not_exist_is_named_and_not_made(
    project: Project, tmp_path: Path
) -> None:
    uri, registry = "models:/trained/1", f"sqlite:///{tmp_path / 'no.db'}"
    model = Model(name="m", source=uri, tracking_uri=project.tracking_uri, registry_uri=registry)
    with pytest.raises(InputError, match=r"no\.db, which does not exist\. Set MLFLOW_REGISTRY_URI"):
        resolve(uri, model)
    assert not (tmp_path / "no.db").exists()


def test_a_logged_model_is_found_by_its_run_among_hundreds_of_its_name(project: Project) -> None:
    client = project.client
    first, others = (client.create_run("1").info.run_id for _ in range(2))
    wanted = client.create_logged_model("1", "chat", source_run_id=first)
    for _ in range(101):  # newer ones: more than a page of them
        client.create_logged_model("1", "chat", source_run_id=others)
    found = of_run(client, f"{first}/chat/model", f"runs:/{first}/chat/model", "")
    assert (found.model_id, found.path) == (wanted.model_id, "model")


def test_a_model_of_another_flavor_is_one_clear_line(trained: Trained) -> None:
    with tracking(trained), mlflow.start_run():
        logged = mlflow.pyfunc.log_model(
            name="echo", python_model=lambda model_input: model_input, pip_requirements=["mlflow"]
        )
    uri = logged.model_uri
    words = "is of MLflow's flavor python_function; weights can be taken of the flavor transformers"
    with pytest.raises(InputError, match=words):
        resolve(uri, Model(name="m", source=uri, tracking_uri=trained.tracking_uri))


def test_mlflow_leads_from_the_package_to_the_run_that_trained_it(
    trained: Trained, tmp_path: Path
) -> None:
    store = Project(Path(shutil.copytree(trained.folder, tmp_path / "store")))
    here = Trained(store.folder, trained.run_id, trained.model)
    checkpoint = here.fetch("models:/trained@best")
    logged = here.call("log_transformers", f"source={checkpoint.uri}", "model.name=m").models[0]
    with tracking(here):
        client = here.client
        client.create_registered_model("m-transformers")
        entry = Entry(logged, "m-transformers", provenance_tags(logged), "")
        version = make_version(client, entry)
    assert version.tags["training_run"] == f"runs:/{trained.run_id}"
    assert version.run_id == trained.run_id
    packaging = client.get_run(str(client.get_logged_model(logged.model_id).source_run_id))
    assert packaging.inputs is not None
    assert [model.model_id for model in packaging.inputs.model_inputs] == [
        trained.model.removeprefix("models:/")
    ]


@pytest.mark.xdist_group("servers")
def test_a_checkpoint_on_another_server_is_fetched_once(
    lettered: Path, project: Project, tmp_path: Path
) -> None:
    (tmp_path / "server").mkdir()
    database = f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"
    server = Server(database, tmp_path / "server")
    try:
        client = MlflowClient(server.address)
        run = client.create_run("0").info
        client.log_artifacts(run.run_id, str(lettered), "checkpoint")
        own = [f"model.tracking_uri={server.address}", "model.name=m"]
        own += [f"model.source={run.artifact_uri}/checkpoint"]
        project.call("fetch", *own)
        project.call("fetch", *own)
        reused = [fetching.data.tags["reused"] for fetching in project.runs("fetch")]
        assert reused == ["true", "false"]
        changed = shutil.copytree(lettered, tmp_path / "changed")
        (changed / "chat_template.jinja").write_text("{{ messages[0].content }}</s>")
        client.log_artifacts(run.run_id, str(changed), "checkpoint")
        again = project.call("fetch", *own)
    finally:
        server.kill()
    recorded = read_provenance(Path(again.uri))
    assert recorded.training["run"] == run.run_id
    assert recorded.training["tracking"] == server.address
    [newest, *_] = project.runs("fetch")
    assert newest.data.tags["reused"] == "false"
