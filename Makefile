# Everything happens in an environment of its own, .venv; the system's Python is only used to make that.
#
#   PYTHON=python3.12        the Python to make .venv with (3.11 or newer)
#   TORCH="torch==2.12.1"    another torch than requirements.txt pins; takes effect when .venv is made (`make clean`)
#   ARGS="-k gate"           more arguments for the target's command

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run in a process for each core, four at most: some need a few GiB.
WORKERS := -n auto --maxprocesses 4 --dist worksteal
BUILD_INPUTS := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -type f)
CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help test demo bench verify lint format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(VENV)/installed ## run the tests (all but the slow ones, which CI runs too)
	$(BIN)/python -m pytest $(WORKERS) -m "not slow" $(ARGS)

demo: $(VENV)/installed ## verify the gates, then train an Attention U-Net on real CT images; writes report/
	$(BIN)/python -m attn_gate verify
	$(BIN)/python -m attn_gate demo $(ARGS)

bench: $(VENV)/installed ## measure speed and memory against eager PyTorch and torch.compile
	$(BIN)/python -m attn_gate bench $(ARGS)

verify: $(VENV)/installed ## compare every gate on every backend with the float64 reference
	$(BIN)/python -m attn_gate verify $(ARGS)

lint: $(VENV)/requirements ## check style: ruff for Python, clang-format for C++
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: $(VENV)/requirements ## bring all code into that style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_SOURCES)

wheel: $(VENV)/requirements ## build the wheel into dist/
	rm -rf dist
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info attn_gate/*.so attn_gate/_build_info.json

# The requirements are a command of their own: the build of attn_gate takes torch's headers from the environment.
$(VENV)/requirements: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("attn_gate: make needs Python 3.11 or newer, \
	$(PYTHON) is %d.%d: run make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
ifdef TORCH
	$(BIN)/pip install $(TORCH)
	grep -v -e '^torch==' -e '^triton==' requirements.txt > $(VENV)/without-torch.txt
	$(BIN)/pip install -r $(VENV)/without-torch.txt
else
	$(BIN)/pip install -r requirements.txt
endif
	touch $@

# Python files need no step: the install is editable.
$(VENV)/installed: $(VENV)/requirements $(BUILD_INPUTS)
	$(BIN)/pip install --no-deps --editable .
	touch $@
