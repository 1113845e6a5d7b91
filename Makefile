# Every target makes .venv by itself, once, from requirements.lock; only Python 3.11 or newer and the package registries are needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CLIENTS := .venv-clients/bin

# Of `make test` what needs no browser, Prometheus, Ray, nginx, network or started service, in under 90 s on two idle cores.
FAST := tests/core tests/engine tests/text tests/telemetry tests/api tests/catalog tests/model/test_sampler.py \
	tests/demo/test_tasks.py tests/deploy/test_kubernetes.py tests/deploy/test_settings_named.py \
	tests/test_architecture.py tests/test_docs.py tests/test_keys.py tests/test_settings.py tests/test_source_urls.py
NOT_FAST := tests/text/test_template_renderer.py tests/telemetry/test_traces.py tests/api/test_upgrade.py tests/api/test_wire.py \
	tests/catalog/test_cases.py tests/catalog/test_shared.py tests/catalog/validator/test_process.py tests/catalog/validator/test_base_weights.py

.PHONY: venv serve test test-fast test-clients image-test soak bench lint

venv: $(READY)

# torch comes with its own dependencies (a CUDA build brings libraries that a CPU build has no use for); all the rest is in the lock,
# and is installed as pinned there: the old clients and the wheel with the demo base pin what nobody needs of them.
$(READY): requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint requirements.lock torch
	$(BIN)/pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

serve: $(READY)
	$(BIN)/python -m service serve

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Browsers, chaos, a cluster and what weighs processes want the machine for themselves.
ALONE := tests/console tests/test_chaos.py tests/test_isolation.py tests/test_memory.py tests/deploy/test_ray.py

# In two processes, as tests/split.py splits them, then the rest in one.
test: lint
	$(BIN)/pytest --numprocesses 2 $(ALONE:%=--ignore=%)
	$(BIN)/pytest $(ALONE)

test-fast: $(READY)
	$(BIN)/pytest --numprocesses 2 $(FAST) $(NOT_FAST:%=--ignore=%)

# Other people's clients, installed as pinned under tests/clients/more; node, npm and a JDK must be there.
test-clients: $(READY) .venv-clients/.ready tests/clients/more/node_modules/.ready
	$(BIN)/pytest tests/clients/other_clients.py

.venv-clients/.ready: tests/clients/more/requirements.lock
	$(PYTHON) -m venv .venv-clients
	$(CLIENTS)/pip install --quiet --constraint requirements.lock torch
	$(CLIENTS)/pip install --quiet --no-deps --requirement tests/clients/more/requirements.lock
	touch $@

tests/clients/more/node_modules/.ready: tests/clients/more/package-lock.json
	npm ci --silent --prefix tests/clients/more
	touch $@

# For a release: builds the image and runs it as compose does, with docker or podman. BASE is its base, BUILD_FLAGS more flags of its build.
image-test: $(READY)
	$(BIN)/pytest tests/deploy/built_image.py

soak: $(READY)
	WALKS=10000 $(BIN)/pytest --numprocesses 2 --dist load tests/engine/test_random_walk.py tests/worker/test_steps_ahead.py
	CHAOS_SECONDS=600 $(BIN)/pytest -s tests/test_chaos.py

bench: $(READY)
	$(BIN)/python -m deploy.bench.grid $(BENCH)
