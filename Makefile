# Every target sets up what it needs. PYTHON picks the interpreter of the virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check format docs reproduce sanitize bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: $(VENV)/.quickstart  ## install and train a dense and an MoE model on this machine's own text
	$(BIN)/coterie quickstart

test: $(VENV)/.test  ## run the tests (under 12 minutes on two cores)
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.test  ## run the tests that take minutes each
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/.test  ## lint, types, and which room may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test  ## format the code and mend what lint can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs  ## build the site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reproduce: $(VENV)/.test  ## re-run every paper at the standard budget; results go to results/
	$(BIN)/coterie reproduce --all --out results

sanitize: $(VENV)/.test  ## run the native kernel's tests under the address and undefined-behaviour sanitizers
	PYTHON=$(BIN)/python bash tests/kernels/sanitize.sh

bench: $(VENV)/.test  ## time the MoE layer beside its peers
	$(BIN)/python -m benchmarks.moe_layer

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -o -name '*.egg-info' | xargs rm -rf

# One installation per purpose; a change of the pins or of the metadata installs anew.
$(VENV)/.quickstart: pyproject.toml setup.py constraints.txt
	$(call install,.)

$(VENV)/.test: pyproject.toml setup.py constraints.txt
	$(call install,.[test])

$(VENV)/.docs: pyproject.toml setup.py constraints.txt
	$(call install,.[docs])

define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)'
	touch $@
endef
