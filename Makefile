# The commands people type. Each makes what it needs in .venv, from a bare checkout with Python 3.11 and a C++ compiler.
#
#   make demo      install, pull the demo model, answer a question
#   make test      install, pull the demo model, run the tests
#   make lint      ruff and clang-format, as checks        make format   the same, applied
#   make types     mypy, strict
#   make bench     the figures of README.md, into docs/benchmarks/
#   make peers     the same work beside other engines that are installed (PEER_ROOT; docs/benchmarks/README.md)
#   make chaos     10,000 requests, cancelled and broken at random     make soak   120 % load for SOAK_MINUTES
#   make lag       how late a host's loop runs, here and under other engines, into docs/benchmarks/
#   make test-arm64  kernels for arm64, cross-built and run under an emulator
#   make sanitize  kernels, pool and programs under address, undefined-behaviour and thread sanitizers
#   make fuzz      damaged GGUF files for FUZZ_MINUTES
#   make test-slow the slow tests, at most SLOW_SECONDS    make clean    remove .venv and build
#
# TORCH    which torch to install; its CPU build is taken where one is offered (a CUDA build is gigabytes)
# TORCH_INDEX  the address of an index of CPU builds, where the usual one has none
# PYTHON   the interpreter of .venv                        PYTEST_ARGS  more arguments for pytest

TORCH ?= torch==2.13.0
TORCH_INDEX ?=
SLOW_SECONDS ?= 900
SLOW_MODEL ?= qwen2.5-coder-0.5b-instruct
PYTEST_ARGS ?=
SOAK_MINUTES ?= 10
CHAOS_REQUESTS ?= 10000
FUZZ_MINUTES ?= 10
PEER_ROOT ?= $(STREAMGEN_PEERS)
PEER_ARGS ?= --model demo --works prefill-512,decode-1,decode-8,decode-32 --rounds 3 --name peers
QUESTION ?= Name three rivers of Europe, and say in a sentence where one of them ends.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMPS := $(VENV)/stamps
CPP := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.inl)
NATIVE_TESTS := $(wildcard tests/native/*.cpp tests/native/*.h)

.PHONY: demo test test-slow test-arm64 sanitize fuzz lint types format bench peers chaos soak lag clean tools
.DELETE_ON_ERROR:

demo: $(STAMPS)/package $(STAMPS)/model
	@echo "> $(QUESTION)"
	@$(BIN)/streamgen run --prompt "$(QUESTION)" --max-tokens 96

test: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/model
	@$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

# pytest ends with 5 where no test is marked slow, which is no failure.
test-slow: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/model
	@echo "a larger model for slow tests, $(SLOW_MODEL), fetched once (491 MB)"
	@$(BIN)/python -m tests.real_models $(SLOW_MODEL) || echo "it cannot be fetched here: tests that need it will skip"
	@$(BIN)/python -m pytest -m slow --session-timeout=$(SLOW_SECONDS) $(PYTEST_ARGS) || test $$? -eq 5

test-arm64: $(STAMPS)/test
	@$(BIN)/python -m tests.native.build arm64

sanitize: $(STAMPS)/test
	@$(BIN)/python -m tests.native.build asan tsan

fuzz: $(STAMPS)/package $(STAMPS)/test
	@$(BIN)/python -m tests.checkpoints.gguf_fuzz --minutes $(FUZZ_MINUTES)

lint: $(STAMPS)/dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP) $(NATIVE_TESTS))

format: $(STAMPS)/dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(if $(CPP),$(BIN)/clang-format -i $(CPP) $(NATIVE_TESTS))

types: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/dev
	@$(BIN)/mypy

bench: $(STAMPS)/package $(STAMPS)/model
	@$(BIN)/python benchmarks/offline.py

peers: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/model
	@$(BIN)/python benchmarks/peers.py --peer-root "$(PEER_ROOT)" $(PEER_ARGS)

chaos: $(STAMPS)/package $(STAMPS)/test
	@$(BIN)/python -m tests.chaos --requests $(CHAOS_REQUESTS)

soak: $(STAMPS)/package $(STAMPS)/model
	@$(BIN)/python benchmarks/soak.py --minutes $(SOAK_MINUTES)

lag: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/model
	@$(BIN)/python benchmarks/host_lag.py

clean:
	rm -rf $(VENV) build

# ---- how .venv comes about -------------------------------------------------------------------------------------------

tools:
	@test -n "$(PYTHON)" || { echo "streamgen needs Python 3.11 or newer: install it, or name it with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "streamgen needs Python 3.11 or newer; $(PYTHON) is older or missing."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "streamgen needs a C++ compiler: install g++ or clang++."; exit 1; }

$(STAMPS)/venv:
	@$(MAKE) --no-print-directory tools
	@echo "[1/4] creating $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# The CPU build where an index offers it, else whatever the index has (as on macOS).
$(STAMPS)/torch: | $(STAMPS)/venv
	@echo "[2/4] installing $(TORCH), about 200 MB"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)+cpu" 2>/dev/null || \
	  $(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(STAMPS)/package: pyproject.toml CMakeLists.txt csrc/CMakeLists.txt $(CPP) | $(STAMPS)/torch
	@echo "[3/4] building and installing streamgen"
	@$(PIP) install --editable .
	@touch $@

$(STAMPS)/model: | $(STAMPS)/package
	@echo "[4/4] the demo model"
	@$(BIN)/streamgen pull demo >/dev/null
	@touch $@

# An extra's requirements alone: the package itself need not be built again for them.
$(STAMPS)/test $(STAMPS)/dev: $(STAMPS)/%: pyproject.toml | $(STAMPS)/venv
	@echo "installing what '$*' needs"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$*"], sep="\n")' > $@.txt
	@$(PIP) install --requirement $@.txt
	@touch $@
