"""Let a serving endpoint follow the champion; one that serves it already is left alone.

    python deploy/databricks/serve.py slm-chat main.slm.<model>-<target>-chat [CPU_LARGE]

An endpoint serves a number, not an alias, so this runs after each promotion: as the last task of
the job `package`, where the model is "": the one that the task before registered or rolled back.
Without an endpoint's name it does nothing.
"""

import contextlib
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from databricks.sdk import WorkspaceClient
from databricks.sdk.config import Config
from databricks.sdk.errors import NotFound, OperationFailed
from databricks.sdk.service.serving import EndpointCoreConfigInput, ServedEntityInput

# Of a replica, by its workload type; its host may have more cores than it is given.
THREADS, FEW_THREADS = {"CPU_MEDIUM": 8, "CPU_LARGE": 16}, 4
PATIENCE_S = 60  # with a workspace that does not answer
WAIT = timedelta(hours=1)  # an image is built for each version


def serve(endpoint: str, model: str = "", workload_type: str = "CPU") -> None:
    """Make the endpoint, or move it to the champion's version, and wait until it serves that."""
    model = model or registered()
    patient = Config(retry_timeout_seconds=PATIENCE_S, http_timeout_seconds=PATIENCE_S)
    client, (*schema, name) = WorkspaceClient(config=patient), model.split(".", 2)
    model = ".".join([*schema, name.replace(".", "_")]).lower()  # as slm/registry/names.py names it
    version = str(client.model_versions.get_by_alias(model, "champion").version)
    entity = {
        "entity_name": model,
        "entity_version": version,
        "workload_type": workload_type,
        "workload_size": "Small",
        "scale_to_zero_enabled": False,  # the first request would wait for the model to load
        "environment_vars": {"OMP_NUM_THREADS": str(THREADS.get(workload_type, FEW_THREADS))},
    }
    served, endpoints = [ServedEntityInput.from_dict(entity)], client.serving_endpoints
    try:
        with contextlib.suppress(OperationFailed):  # of an earlier update: it is made again
            endpoints.wait_get_serving_endpoint_not_updating(endpoint, timeout=WAIT)
        found = endpoints.get(endpoint).as_dict().get("config", {}).get("served_entities", [])
    except NotFound:
        config = EndpointCoreConfigInput(name=endpoint, served_entities=served)
        endpoints.create_and_wait(endpoint, config=config, timeout=WAIT)
    else:
        if len(found) == 1 and entity.items() <= found[0].items():
            print(f"{endpoint} serves {model} version {version} already")
            return
        endpoints.update_config_and_wait(endpoint, served_entities=served, timeout=WAIT)
    print(f"{endpoint} serves {model} version {version}")


def registered() -> str:
    """The model that run.py named on this node's disk; RuntimeError unless it is one."""
    local = Path("/local_disk0")
    disk = (local if local.exists() else Path(tempfile.gettempdir())) / "slm"
    file = disk / "registered"
    names = file.read_text().split() if file.is_file() else []
    if len(names) != 1:
        raise RuntimeError(
            f"the task before registered {', '.join(names) or 'no model on this node'}, and an "
            "endpoint follows one: give serve.py the model's name, or leave out the endpoint's."
        )
    return names[0]


if __name__ == "__main__" and any(sys.argv[1:2]):
    serve(*sys.argv[1:])
