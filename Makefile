# Everything a person types. `make demo` and `make test` need Python 3.11 or later, make and a C compiler.
# The first Python that runs and is new enough; `make PYTHON=...` chooses another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin

.PHONY: help demo test lint types contracts tests bench faults e2e proto pages clean

help: ## show this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# The environment is rebuilt when what it installs has changed.
.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo 'fedbasin needs Python 3.11 or later; install it, or set PYTHON='; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# The checkout under the package's name, for tools that read files and do not import.
	rm -rf .links && mkdir .links && ln -s .. .links/fedbasin
	touch $@

demo: .venv/ready ## five clients that never shared a start, fused with and without alignment
	$(BIN)/python -m fedbasin.deploy.demo

test: lint types contracts tests ## what CI runs

lint: .venv/ready ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/ready ## strict types
	$(BIN)/mypy -p fedbasin
	# The example is an app of its own, with a name of its own.
	MYPYPATH=deploy/digits:.links $(BIN)/mypy -p digits

contracts: .venv/ready ## which room may import which
	PYTHONPATH=.links $(BIN)/lint-imports

tests: .venv/ready ## the test suite
	$(BIN)/pytest

bench: .venv/ready ## measure against peers in the same run; writes docs/benchmarks.md
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks

faults: .venv/ready ## kill servers, clients and the demo in the middle of a round
	$(BIN)/pytest -m 'slow and deployed' tests/faults

e2e: .venv/ready ## the compose file on a real Docker engine
	FEDBASIN_E2E=1 $(BIN)/pytest tests/deploy/test_compose.py

proto: .venv/ready ## generate code from the .proto files
	$(BIN)/python -m fedbasin.proto.generate

pages: .venv/ready ## write what is generated: metrics, dashboard, settings
	$(BIN)/python -m fedbasin.deploy.metrics_page
	$(BIN)/python -m fedbasin.deploy.dashboard

clean: ## remove what make made
	rm -rf .venv .links build runs *.egg-info
