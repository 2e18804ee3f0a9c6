# Every target does its own set-up: a virtual environment with the locked, hashed dependencies.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
T ?= tests

.PHONY: run test test-deploy test-consumers test-kubernetes check format docs bench soak image lock clean chaos mutants

run: $(READY)
	@$(BIN)/relay dev --play

test: check
	@$(BIN)/pytest --numprocesses 4 --dist loadfile $(T)

check: $(READY)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/pytest -q tests/test_layering.py tests/test_docs.py tests/unit/test_asyncapi.py

format: $(READY)
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

# What `make test` leaves out: the manifests in the real helm and kubectl, the alerts and the dashboard in a real
# Prometheus (Debian: apt-get install prometheus). With CHART=path/to/helm-charts/rocketchat also Rocket.Chat's own chart.
test-deploy: $(READY)
	@RELAY_TEST_DEPLOY=1 RELAY_TEST_CHART="$(CHART)" $(BIN)/pytest tests/deploy

# What `make test` leaves out: the guide's examples in Node, shell and Flink SQL, AsyncAPI's own parser. Node and the
# packages come from PyPI and npm (270 MB), Flink from the Maven repository (134 MB); kcat and jq must be there (Debian:
# apt-get install kcat jq).
test-consumers: $(READY)
	@RELAY_TEST_CONSUMERS=1 $(BIN)/pytest tests/consumers

# What `make test` leaves out, too: deploy/ in the cluster that KUBECONFIG names, in namespaces of their own. It needs a
# default StorageClass, and the image: IMAGE=name:tag, or the one that is built here, if its nodes share this Docker. Its
# pods must reach this machine, where Kafka runs: ADDRESS=…, if it is not the one on the way to the nodes. With
# CRDS=folder the definitions of Strimzi's and the Prometheus operator's kinds; CHART as above.
test-kubernetes: $(READY) $(if $(IMAGE),,image)
	@RELAY_TEST_KUBERNETES=1 RELAY_TEST_IMAGE="$(IMAGE)" RELAY_TEST_ADDRESS="$(ADDRESS)" RELAY_TEST_CRDS="$(CRDS)" \
	  RELAY_TEST_CHART="$(CHART)" $(BIN)/pytest tests/kubernetes

image: $(READY)
	@docker build --tag rocketchat-kafka-relay:$$($(BIN)/relay --version | cut -d' ' -f2) \
	  --build-arg VERSION=$$($(BIN)/relay --version | cut -d' ' -f2) --build-arg REVISION=$$(git rev-parse HEAD) .

docs: $(READY)
	@$(BIN)/python tests/docs.py
	@PYTHONPATH=tests $(BIN)/python -m deploy.prometheus_for_tests

bench: $(READY)
	@$(BIN)/python -m tests.bench

# An outage of 10 minutes, a restart with a million events, half an hour of steady load: about an hour.
soak: $(READY)
	@$(BIN)/python -m tests.bench.soak

# Faults under load, and an oracle: make chaos FAULTS=1000 SEED=1 MINUTES=90 CLUSTER=3 RATE=1000
chaos: $(READY)
	@$(BIN)/python -m tests.chaos $(if $(FAULTS),--faults $(FAULTS)) $(if $(SEED),--seed $(SEED)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(CLUSTER),--cluster $(CLUSTER)) $(if $(RATE),--rate $(RATE))

# The relay with one thing broken at a time: which test notices? make mutants M="watermark"
mutants: $(READY)
	@$(BIN)/python -m tests.mutants $(M)

# Rewrites the lock files from pyproject.toml; hashes only, no registry addresses.
lock:
	@$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/pip install --quiet uv
	@$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --no-annotate pyproject.toml -o requirements.lock
	@$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --no-annotate --extra dev --extra test -c requirements.lock pyproject.toml -o requirements-dev.lock
	@rm -rf $(VENV)-lock

clean:
	@rm -rf $(VENV) dist spool .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): requirements-dev.lock pyproject.toml
	@echo "Setting up $(VENV) (once; about 200 MB)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)
