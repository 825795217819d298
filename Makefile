# make run, make test, make bench: each sets up .venv from requirements.txt first, and anew whenever that file changes.
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PYTHON := $(shell command -v python3.11 || command -v python3)
READY := $(VENV)/.ready-$(shell cksum < requirements.txt | cut -d' ' -f1)

.PHONY: run test lint format bench clean

run: $(READY)  ## package the default model for the default target
	PATH="$(BIN):$$PATH" mlflow run . --env-manager local

test: lint  ## checks, then the tests on the real small model
	"$(BIN)/python" -m pytest

lint: $(READY)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

format: $(READY)
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

$(READY): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed, found " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
	"$(BIN)/pip" install --disable-pip-version-check -r requirements.txt
	touch $@

bench: run  ## the packaged models against a bare loop, the checkpoint and peers
	"$(BIN)/python" -m bench

clean:  ## the outcomes of steps; MLflow's own store stays
	rm -rf work
