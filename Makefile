# Two commands: `make demo` fine-tunes a real language model, `make test` runs the tests. Beside the demo,
# `make vision` fine-tunes a vision transformer and `make classify` compares every method on one task.
# Each makes the virtual environment and installs what it needs; a second run goes straight to work.

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
VISION_ARGS ?=
CLASSIFY_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo vision classify test lint types codegen codegen-full bench bench-peers clean

demo: $(VENV)/.demo
	$(BIN)/python examples/finetune.py $(DEMO_ARGS)

vision: $(VENV)/.vision
	$(BIN)/python examples/vision.py $(VISION_ARGS)

classify: $(VENV)/.classify
	$(BIN)/python examples/classify.py $(CLASSIFY_ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# Compiles the kernels for every target, without a GPU: each at its default configurations (what CI does), or all.
codegen: $(VENV)/.test
	$(BIN)/python -m bench codegen --quick

codegen-full: $(VENV)/.test
	$(BIN)/python -m bench codegen

bench: $(VENV)/.test
	$(BIN)/python -m bench $(BENCH_ARGS)

# The same beside torchtune and loralib, which need an older torchao than the tests: an environment of its own.
bench-peers: $(VENV)-peers/.peers
	$(VENV)-peers/bin/python -m bench $(BENCH_ARGS)

$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastpeft needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "installing torch into $(VENV) (once)"
	@$(INSTALL) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml examples/requirements-data.txt
	@echo "installing what the demo needs (once)"
	@$(INSTALL) --editable '.[demo]'
	@$(INSTALL) --no-deps --requirement examples/requirements-data.txt
	@touch $@

$(VENV)/.vision $(VENV)/.classify: $(VENV)/.%: $(VENV)/.base pyproject.toml examples/requirements-%.txt
	@echo "installing what the example needs (once)"
	@$(INSTALL) --editable '.[demo]'
	@$(INSTALL) --no-deps --requirement examples/requirements-$*.txt
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml
	@echo "installing what the tests need (once)"
	@$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)-peers/.peers: constraints.txt pyproject.toml
	@$(PYTHON) -m venv $(VENV)-peers
	@echo "installing torch and the peers into $(VENV)-peers (once)"
	@sed 's/^torchao==.*/torchao==0.17.0/' constraints.txt > $(VENV)-peers/constraints.txt
	@$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(VENV)-peers/constraints.txt --editable '.[peers]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-peers .cache runs build dist *.egg-info
