# make setup | chat | doctor | test | rehearse | check | bench. Everything lives in .venv; nothing else is touched.

# Under Rosetta a Mac's Python is one for Intel, which MLX has no wheel for.
PROBE := import platform, sys; is_intel = (sys.platform, platform.machine()) == ("darwin", "x86_64"); \
	sys.exit(is_intel or sys.version_info < (3, 11))
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c '$(PROBE)' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# A file's tests stay in one process; two BLAS threads in each of several processes would be slower.
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile
PAIR := smollm2-135m gemma3-270m
# Not the environment's: some shells export theirs.
override PROMPT := $(if $(filter command,$(origin PROMPT)),$(value PROMPT))
export PROMPT

.PHONY: help setup blas chat doctor test rehearse rehearse-fast check bench

help:
	@echo "make setup               create .venv and install (everything below does it first)"
	@echo "make chat                chat with the embedded pair in this terminal"
	@echo "make chat PROMPT='...'   one answer in every mode"
	@echo "make doctor              is this machine right? in under a minute"
	@echo "make test                run the tests"
	@echo "make rehearse            the same with a Mac's decisions, on any machine"
	@echo "make rehearse-fast       those of them that know about precision"
	@echo "make check               ruff and mypy"
	@echo "make bench               print the measured ratios"

setup: $(BIN)/.installed blas

$(BIN)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "c2c-mlx needs Python 3.11 or newer on the PATH; on a Mac, native (arm64)"; exit 2; }
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -c 'import pip; $(PROBE)' >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

# Linux only: MLX's wheel bundles a slow reference BLAS. c2c_mlx.blas says what is missing.
BLAS_NOTICE := $(BIN)/python -c "from c2c_mlx import blas; print(blas.notice or '', end='')"
blas: $(BIN)/.installed
	@if [ -n "$$($(BLAS_NOTICE))" ] && command -v apt-get >/dev/null; then \
		if [ "$$(id -u)" = 0 ]; then sudo=; else sudo="sudo -n"; fi; \
		echo "installing libopenblas0-pthread (a fast BLAS)"; \
		{ $$sudo apt-get update -qq && $$sudo apt-get install -y -qq libopenblas0-pthread; } \
			>/dev/null 2>&1 || true; \
	fi
	@$(BLAS_NOTICE)

chat: setup
	@if [ -n "$$PROMPT" ]; then \
		printf '%s' "$$PROMPT" | $(BIN)/c2c-chat --mode c2c,relay,receiver,sharer --prompt -; \
	else $(BIN)/c2c-chat; fi

test: setup
	@$(BIN)/c2c-weights pull $(PAIR) >/dev/null || echo "so the tests that need the embedded pair are skipped"
	@$(PYTEST)

doctor: setup
	@$(BIN)/c2c-doctor

# What a Mac's GPU would decide, computed here. The embedded pair is packed then, and a CPU takes
# minutes to read a prompt with packed weights.
rehearse: setup
	@C2C_MLX_REHEARSE=gpu $(PYTEST) -m "not pair"

PRECISION := tests/golden tests/unit/test_c2c.py tests/unit/test_fused.py \
	tests/unit/test_several_sharers.py tests/unit/test_state_layers.py tests/unit/test_rope.py \
	tests/unit/test_fuser.py tests/unit/test_kv.py tests/unit/test_fused_answers.py
rehearse-fast: setup
	@C2C_MLX_REHEARSE=gpu $(PYTEST) -m "not pair" $(PRECISION)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python benchmarks/fuser.py
	@$(BIN)/python benchmarks/turns.py
	@$(BIN)/python benchmarks/step.py
	@$(BIN)/python benchmarks/help.py
	@$(BIN)/python benchmarks/first_token.py
	@$(BIN)/python benchmarks/response.py
	@$(BIN)/python benchmarks/serve.py
	@$(BIN)/python benchmarks/remote.py
	@$(BIN)/python benchmarks/tui.py
	@if $(BIN)/python -c "import torch" 2>/dev/null; then export OMP_WAIT_POLICY=passive; \
		$(BIN)/python benchmarks/against_reference.py && $(BIN)/python benchmarks/step_against_reference.py; \
		else echo "no figures against PyTorch: pip install -e '.[reference]' has it"; fi
