# make run, make test, make bench: each sets up .venv from requirements.txt first, and anew whenever that file changes.
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PYTHON ?= $(firstword $(foreach v,3.11 3.12,$(shell python$(v) -c 'import sys; print(sys.executable)' 2>/dev/null)) python3)
SPARK := .venv-spark
READY := $(VENV)/.ready-$(shell cksum < requirements.txt | cut -d' ' -f1)
UV := $(shell sed -n 's/^uv==/uv==/p' requirements.txt)
# uv is told what pip is told of package indexes.
TOLD := UV_FIND_LINKS="$$PIP_FIND_LINKS" UV_DEFAULT_INDEX="$$PIP_INDEX_URL" UV_INDEX="$$PIP_EXTRA_INDEX_URL"

.PHONY: setup run test test-kills test-optimum test-spark test-databricks lint lint-deploy format bench bench-export bench-score bench-serve clean

setup: $(READY)  ## .venv alone

run: $(READY)  ## package the default model for the default target
	PATH="$(BIN):$$PATH" mlflow run . --env-manager local

# Two workers, and what they start, with as many threads as there are cores each only spin against each other.
test: lint  ## checks, then the tests on the real small model
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test-kills: $(READY)  ## kill -9 at 60 points of the real steps, at each write to the registry, of a server; 20 minutes
	SLM_KILLS=5 "$(BIN)/python" -m pytest -k killed tests/test_kills.py tests/test_register.py tests/test_rollback.py tests/test_remote.py

test-optimum: $(READY)  ## graphs by optimum, in its own environment: a GB in ~/.mlflow/envs
	SLM_OPTIMUM=1 "$(BIN)/python" -m pytest tests/test_optimum_project.py

test-spark: $(SPARK)/.ready  ## score on a real standalone cluster; Java 17 is needed
	"$(CURDIR)/$(SPARK)/bin/python" -m pytest tests/test_score_spark.py

test-databricks: $(READY)  ## a whole main by the job of the bundle, in the stand-in of a workspace; minutes
	SLM_WHOLE=1 "$(BIN)/python" -m pytest tests/test_databricks.py -k default_model

lint: $(READY)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

# Each tool runs in an environment of requirements-deploy.txt, which uv keeps in its cache.
CHECK := $(TOLD) "$(BIN)/uv" run --quiet --no-project --isolated --python "$(BIN)/python" --with-requirements requirements-deploy.txt

lint-deploy: $(READY)  ## the files of deploy/ and the workflow, as their platforms read them
	$(CHECK) hadolint deploy/Dockerfile
	$(CHECK) kubernetes-validate --strict --quiet deploy/kubernetes/*.yaml
	$(CHECK) check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(CHECK) zizmor --offline --quiet .github/workflows
	$(CHECK) python -c 'from azure.ai.ml import load_online_deployment, load_online_endpoint; \
		load_online_endpoint("deploy/azureml/endpoint.yml"); load_online_deployment("deploy/azureml/deployment.yml")'
	@if command -v databricks > /dev/null; then databricks bundle schema | $(CHECK) check-jsonschema --quiet --schemafile - databricks.yml; \
		else echo "databricks.yml: the Databricks CLI is not here; tests/test_databricks.py has the SDK read it" >&2; fi

format: $(READY)
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

# Quiet; what fails is shown in full. uv shows progress on a terminal; pip takes over where uv cannot work.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed, found " + sys.version)'
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): about 2 GB, a minute or two the first time" >&2
	@$(PYTHON) -m venv --clear $(VENV)
	@"$(BIN)/pip" install --quiet --disable-pip-version-check $(UV)
	@$(TOLD) "$(BIN)/uv" pip install --python "$(BIN)/python" --compile-bytecode -r requirements.txt $$([ -t 2 ] || echo --quiet) \
		|| "$(BIN)/pip" install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# The packages of .venv, and Spark beside them.
$(SPARK)/.ready: $(READY) requirements-spark.txt
	@echo "Setting up $(SPARK): 0.5 GB besides $(VENV)" >&2
	@$(PYTHON) -m venv --clear $(SPARK)
	@"$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(SPARK)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
	@$(TOLD) "$(BIN)/uv" pip install --python $(SPARK)/bin/python -r requirements-spark.txt $$([ -t 2 ] || echo --quiet)
	@touch $@

bench: run  ## the packaged models against a bare loop, the checkpoint and peers
	"$(BIN)/python" -m bench

bench-export: $(READY)  ## seconds and memory of exports by size
	"$(BIN)/python" -m bench.export

bench-score: run $(SPARK)/.ready  ## rows/s of score on one and two executors
	"$(CURDIR)/$(SPARK)/bin/python" -m bench.score models:/smollm2-135m-instruct-cpu-int4-rtn-block-32-acc-level-4-chat@champion

bench-serve: run  ## a server under load: 1 to 64 clients, and against predict
	"$(BIN)/python" -m bench.serve

clean:  ## remove the outcomes of steps, but for what a live run uses; MLflow's own store stays
	@test -x "$(BIN)/python" || { echo "make clean needs $(VENV): make lint sets it up. Or remove the work folder yourself (README)." >&2; exit 1; }
	"$(BIN)/python" -m steps.clean clean.older_than_days=0 clean.registered=true
