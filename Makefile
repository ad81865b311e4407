# `make help` lists the targets. Everything is installed into the checkout (.venv); nothing outside it is touched.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

# The lock file pins every package by hash; a change to it, to a contract or to a pyproject installs anew.
$(READY): requirements/dev.txt pyproject.toml sdk/python/pyproject.toml sdk/python/generate_stubs.py $(shell find protos -name '*.proto')
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e sdk/python -e .
	@touch $@

.PHONY: install
install: $(READY) ## Install everything into .venv

.PHONY: proto
proto: $(READY) ## Generate the gRPC stubs and their types
	$(BIN)/python sdk/python/generate_stubs.py

DEMO ?=
.PHONY: demo
demo: $(READY) ## Run the suite and a fleet of eight workers, and check every invariant
	$(BIN)/python -m demo $(DEMO)

.PHONY: up
up: $(READY) ## Run the suite until Ctrl-C; its data stays in .muster
	$(BIN)/muster up

TESTS ?=
.PHONY: test
test: $(READY) ## Run the test suite against real parts
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(TESTS)

.PHONY: check
check: $(READY) ## Lint, types, layers, contracts, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/python sdk/python/generate_stubs.py --check

.PHONY: bench
bench: $(READY) ## Measure the chassis against bare grpc.aio
	$(BIN)/python -m bench.chassis

BENCH ?=
.PHONY: bench-allocator
bench-allocator: $(READY) ## Measure the allocator, for an hour and a half; BENCH=--quick for under a minute
	$(BIN)/python -m bench.allocator $(BENCH)

.PHONY: bench-tracker
bench-tracker: $(READY) ## Measure the session tracker, for about half an hour; BENCH=--quick for a minute
	$(BIN)/python -m bench.tracker $(BENCH)

.PHONY: fault
fault: $(READY) ## Kill services under two fleets, five minutes each, and check their histories; end every command 100 times
	MUSTER_FAULT_SECONDS=300 MUSTER_EXIT_RUNS=100 $(BIN)/python -m pytest -s tests/fault tests/acceptance/test_exits.py

.PHONY: fault-allocator
fault-allocator: $(READY) ## Kill, stop and restart allocators, PostgreSQL and workers for five minutes; try 2,000 orders of calls
	MUSTER_FAULT_SECONDS=300 $(BIN)/python -m pytest -s tests/fault/test_allocator_checker.py tests/fault/test_allocator_under_faults.py
	MUSTER_PROPERTY_EXAMPLES=2000 $(BIN)/python -m pytest -s tests/property/test_allocator_leases.py

.PHONY: fault-tracker
fault-tracker: $(READY) ## Kill, stop and restart trackers, Redis and PostgreSQL for five minutes; try 2,000 orders of calls
	MUSTER_FAULT_SECONDS=300 $(BIN)/python -m pytest -s tests/fault/test_tracker_checker.py tests/fault/test_tracker_under_faults.py
	MUSTER_PROPERTY_EXAMPLES=2000 $(BIN)/python -m pytest -s tests/property/test_tracker_model.py tests/property/test_tracker_redis_model.py

.PHONY: lock
lock: ## Pin the requirements anew (needs uv)
	./requirements/compile.sh --upgrade

.PHONY: clean
clean: ## Remove the environment, caches and the suite's data
	rm -rf $(VENV) .muster .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis sdk/python/muster/*/v1
