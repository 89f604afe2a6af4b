# Everything a fresh machine with Python (>= 3.11) and make needs: `make train`, `make test`.
PYTHON ?= python3
# PyTorch is only for the tests. On Linux, point PIP_EXTRA_INDEX_URL at PyTorch's CPU builds for a small download.
TORCH ?= torch==2.13.0
WORKDIR ?= runs/digits
BIN := .venv/bin

.PHONY: help train test test-slow test-faults test-tpu check format docs clean

help:
	@echo 'make train      install, train an EPSANet on handwritten digits, evaluate it'
	@echo 'make test       install with the test extra (CPU PyTorch included), run the tests'
	@echo 'make test-slow  the tests that take long'
	@echo 'make test-faults  a run ended at 20 random moments by SIGTERM, SIGHUP and SIGKILL, some without a console'
	@echo 'make test-tpu  programs for TPUs, compiled by libtpu; needs no TPU'
	@echo 'make check      ruff and pyright'
	@echo 'make format     let ruff format and fix what it can'
	@echo 'make docs       build the documentation site into build/site'

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ .venv/installed

train: .venv/installed
	$(BIN)/python train.py --config=configs/digits.py --workdir=$(WORKDIR)
	$(BIN)/epsanet evaluate $(WORKDIR) --data digits
	@echo "workdir:  $(WORKDIR)"
	@echo "evaluate: $(BIN)/epsanet evaluate $(WORKDIR) --data digits"
	@echo "continue: $(BIN)/python train.py --config=configs/digits.py --workdir=$(WORKDIR) --config.epochs=30"

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not faults and not tpu'

test-slow: .venv/installed-dev
	EPSANET_TESTS_OPTIMIZE=1 $(BIN)/python -m pytest -n 2 -m slow

test-faults: .venv/installed-dev
	EPSANET_TESTS_OPTIMIZE=1 $(BIN)/python -m pytest -m faults -s

test-tpu: .venv/installed-dev
	$(BIN)/pip install --quiet libtpu
	$(BIN)/python -m pytest -m tpu

check: .venv/installed-dev
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
