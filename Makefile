# Everything a person types. `make demo` and `make test` need Python 3.11 or later, make and a C compiler.
# The first Python that runs and is new enough; `make PYTHON=...` chooses another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
OLDEST ?= python3.11
BIN := .venv/bin

# What tests compare to the last bit, and what the docs measured, was computed by this one's kernels.
TORCH := torch==2.13.0

.PHONY: help demo test lint types contracts tests newest lock bench faults figures fuzz architectures compose e2e proto pages dist clean

help: ## show this list
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

define LINKS
	# The checkout under the package's name, for tools that read files and do not import.
	rm -rf .links && mkdir .links && ln -s .. .links/fedbasin
endef

# The environment is rebuilt when what it installs has changed.
.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'fedbasin needs Python 3.11 or later; install it, or set PYTHON='; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(LINKS)
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

# On every core, but no more than four: each worker imports torch and starts Flower processes of its own. Files run in
# their own order, because those with few tests, which come last otherwise, are the ones that take minutes.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# One thread for each worker: threads of several workers on the same cores only wait for each other.
tests: .venv/ready ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

# Anew every time, because what is newest changes; the tests alone, because linters grow new rules.
newest: ## the test suite with the newest versions of all it needs, torch too, in build/newest
	@test -n "$(PYTHON)" || { echo 'fedbasin needs Python 3.11 or later; install it, or set PYTHON='; exit 1; }
	rm -rf build/newest
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --upgrade pip
	build/newest/bin/python -m pip install --quiet --editable '.[dev]'
	$(LINKS)
	OMP_NUM_THREADS=1 build/newest/bin/pytest $(PARALLEL)

# By the oldest Python that is supported: what runs on it runs on the newer ones, and not the other way round.
lock: ## write constraints.txt: the newest versions of today that `make test` is to install
	rm -rf build/lock
	$(OLDEST) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	build/lock/bin/python -m pip install --quiet --editable '.[dev]' '$(TORCH)'
	# Without what only some machines have: the CUDA libraries, and the build of torch ("+cpu").
	{ echo '# The versions that `make test` installs, on every Python from 3.11 on. Written by `make lock`.'; \
	build/lock/bin/python -m pip freeze --all --exclude-editable \
	| sed -E -e '/^(pip|cuda-[a-z-]+|nvidia-[a-z0-9-]+|triton)==/d' -e 's/\+[^ ]+$$//' \
	| LC_ALL=C sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/lock

bench: .venv/ready ## measure against peers in the same run; writes docs/records/benchmarks.md
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks

faults: .venv/ready ## kill every kind of process, fill the disk, cut the network, a thousand rounds
	$(BIN)/pytest -m slow tests/faults tests/deploy tests/server --ignore tests/server/files

figures: .venv/ready ## the README's figures on every seed, and models that take longer
	$(BIN)/pytest -m slow tests/test_digits.py tests/test_protocol.py

fuzz: .venv/ready ## a hundred thousand mutated replies in all recipes; TRIES= and SEED= choose others
	PYTHONPATH=. $(BIN)/python -m tests.fuzz $(or $(TRIES),100000) $(or $(SEED),0)

architectures: .venv/ready ## discovery on every model of transformers, timm and torchvision that there is
	$(BIN)/pytest -m slow tests/architectures tests/server/files tests/strategies

compose: ## the federation in containers, and one run of the digits example; CLIENTS=50 chooses their number
	cd deploy && FEDBASIN_CLIENTS=$(or $(CLIENTS),5) docker compose up --build --wait
	cd deploy && FEDBASIN_CLIENTS=$(or $(CLIENTS),5) docker compose run --rm cli

e2e: .venv/ready ## the compose file on a real Docker engine
	FEDBASIN_E2E=1 $(BIN)/pytest -s tests/deploy/test_containers.py

proto: .venv/ready ## generate code from the .proto files
	$(BIN)/python -m fedbasin.proto.generate

pages: .venv/ready ## write what is generated: metrics, dashboard, settings
	$(BIN)/python -m fedbasin.deploy.metrics_page
	$(BIN)/python -m fedbasin.deploy.dashboard

dist: .venv/ready ## the sdist and the wheel of a release, checked, in dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean: ## remove what make made
	rm -rf .venv .links build dist runs *.egg-info
