# Everything a developer runs. Each target first sets up what it needs; the second run starts at once.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

run := $(VENV)/bin/python
ready := $(VENV)/.ready

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(ready)  ## Train a digit classifier from a pipeline, in all its modes (about a minute)
	$(run) docs/examples/digits.py

test: $(ready)  ## Run the tests; ARGS="-k shuffle" picks some
	$(run) -m pytest -n $(WORKERS) $(ARGS)

soak: $(ready)  ## Kills, damaged files, 4 GB and throughput of the sources (some minutes; prints figures)
	$(run) -m pytest -c tests/soak/pytest.ini --rootdir tests/soak tests/soak $(ARGS)

soak-engines: $(VENV)-engines/.engines  ## The throughput beside Grain and torch in one run (downloads some GB once)
	$(VENV)-engines/bin/python -m pytest -c tests/soak/pytest.ini --rootdir tests/soak tests/soak -k test_throughput $(ARGS)

bench: $(ready)  ## Measure against the budget, into docs/benchmarks (about 10 minutes on 2 quiet cores)
	PYTHONPATH=tests $(run) -m benchmarks cpu $(ARGS)

bench-gpu: $(ready)  ## The same on an NVIDIA GPU; ARGS=--dry-run shows that it works without one
	PYTHONPATH=tests $(run) -m benchmarks gpu $(ARGS)

bench-engines: $(ready)  ## Race other engines, each in its own environment (downloads some GB once)
	PYTHONPATH=tests:conformance:conformance/src $(run) -m benchmarks engines $(ARGS)

lint: $(ready)  ## Formatting, lint rules and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

trace: $(ready)  ## Fail on a requirement without a test, or a test without a requirement
	$(run) tests/trace.py

docs: $(ready)  ## Build the site into site/; a dead link fails
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict

engines: $(ready)  ## Make a virtual environment for each engine that the suite compares
	$(run) conformance/engines.py make

results: $(ready)  ## Run the suite on every engine and write conformance/results/
	$(run) conformance/engines.py results

results-check: $(ready)  ## Make the results of the engines that install quickly again, and compare
	$(run) conformance/engines.py check $(ARGS)

goals: $(ready)  ## The goals of the conformance suite, a line and a figure each
	$(VENV)/bin/datarax-conformance goals

mutants: $(ready)  ## Break the model in every known way and see that the suite notices
	$(VENV)/bin/datarax-conformance mutants --strict

test-matrix:  ## Run the tests on every Python from 3.11 on that this machine has
	.ci/matrix $(ARGS)

clean:  ## Remove all that the other targets made
	rm -rf .venv .venv-3.* .venv-engines site build dist .cache .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One process that compares several needs them in one environment; the library's own never has them.
$(VENV)-engines/.engines: $(ready) conformance/adapters/engines.toml
	.ci/venv $(PYTHON) $(VENV)-engines
	$(VENV)-engines/bin/pip install -qq $$($(run) conformance/engines.py requirements grain torch)
	touch $@

$(ready): .ci/venv .ci/requirements.txt pyproject.toml $(wildcard conformance/pyproject.toml)
	.ci/venv $(PYTHON) $(VENV)

.PHONY: help demo soak soak-engines test bench bench-gpu bench-engines lint trace docs engines results results-check goals mutants test-matrix clean
.DEFAULT_GOAL := help
