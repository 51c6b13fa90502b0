# make setup | chat | test | check | bench. Everything lives in .venv; nothing else is touched.

PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := .venv/bin
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: help setup blas chat test check bench

help:
	@echo "make setup               create .venv and install (everything below does it first)"
	@echo "make chat                chat with the embedded pair in this terminal"
	@echo "make chat PROMPT='...'   one answer in every mode"
	@echo "make test                run the tests"
	@echo "make check               ruff and mypy"
	@echo "make bench               print the measured ratios"

setup: $(BIN)/.installed blas

$(BIN)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "c2c-mlx needs Python 3.11 or newer on the PATH"; exit 2; }
	@echo "installing into .venv (a few minutes the first time)"
	@test -d .venv || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

# Linux only: MLX's wheel bundles a reference BLAS that is about 60 times slower.
blas:
	@if [ "$$(uname)" = Linux ] && ! ldconfig -p | grep -q libopenblas.so.0; then \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			echo "installing libopenblas0-pthread (a fast BLAS)"; \
			{ apt-get update -qq && apt-get install -y -qq libopenblas0-pthread; } >/dev/null 2>&1 || true; \
		fi; \
		ldconfig -p | grep -q libopenblas.so.0 || echo "no fast BLAS: MLX will be about 60 times" \
			"slower here; install it with: sudo apt-get install libopenblas0-pthread"; \
	fi

chat: setup
	@if [ -n "$$PROMPT" ]; then \
		printf '%s' "$$PROMPT" | $(BIN)/c2c-chat --mode c2c,relay,receiver,sharer --prompt -; \
	else $(BIN)/c2c-chat; fi

test: setup
	@$(BIN)/python -c "from c2c_mlx import registry; from c2c_mlx.models import find_folder; \
		[find_folder(name) for name in registry.default_pair()]" 2>/dev/null \
		|| echo "the embedded pair could not be fetched: the tests that need it are skipped"
	@$(BIN)/python -m pytest -q

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python benchmarks/fuser.py
	@$(BIN)/python benchmarks/turns.py
	@$(BIN)/python benchmarks/help.py
