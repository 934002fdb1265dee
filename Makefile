# Each target works alone on a fresh machine with Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
UPSTREAM := .venv-traker
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2
PEERS := traker dattri kronfluence bergson
QUALITY_PEERS := traker dattri kronfluence

.PHONY: demo test test-slow lint docs bench bench-full bench-peers bench-quality clean

demo: $(VENV)/.demo
	$(BIN)/python examples/qnli.py

# the second environment holds the reference implementation, for the parity tests: both
# packages are called trak
test: $(VENV)/.dev $(UPSTREAM)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: $(VENV)/.dev $(UPSTREAM)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

# a small size; the figures that are kept are those of bench-full and bench-peers
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks --small

bench-full: $(VENV)/.dev
	$(BIN)/python -m benchmarks

bench-peers: $(VENV)/.dev $(PEERS:%=.venv-bench-%/.installed)
	$(BIN)/python -m benchmarks.peers.run
	$(BIN)/python -m benchmarks.render

# LDS against retraining, here and in the other libraries; `-m benchmarks.quality_time` is
# the time of the one call
bench-quality: $(VENV)/.dev $(QUALITY_PEERS:%=.venv-bench-%/.installed)
	$(BIN)/python -m benchmarks.quality_table.run
	$(BIN)/python -m benchmarks.quality_time
	$(BIN)/python -m benchmarks.quality_table.render

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python $(PIP) "torch==2.13.0"
	$(BIN)/python $(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python $(PIP) "torch==2.13.0"
	$(BIN)/python $(PIP) --editable ".[dev,docs]"
	touch $@ $(VENV)/.demo

$(UPSTREAM)/.installed: constraints.txt
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/python $(PIP) "torch==2.13.0"
	$(UPSTREAM)/bin/python $(PIP) "traker==0.3.2" numpy
	touch $@

# the lists are complete, so nothing that they leave out is installed (CUDA, torchvision)
.venv-bench-%/.installed: benchmarks/peers/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP) "torch==2.13.0"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

clean:
	rm -rf $(VENV) $(UPSTREAM) .venv-bench-* site trak_results
