# Every target sets up .venv first; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN := $(BIN)/python -m launcher
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo compare-demo preference-demo pipeline-demo venv check audit docs format test test-quick-1 test-quick-2 test-quick-slurm test-slow test-slow-1 test-slow-2 test-slow-slurm test-all test-soak test-oldest test-vllm gpu clean
help:
	@echo 'make demo      train a small base model and fine-tune it, on this machine, in minutes'
	@echo 'make compare-demo  full fine-tuning against LoRA, DoRA and IA3 on that base, compared on one page: ten minutes'
	@echo 'make preference-demo  the demo, and what it makes learns which of two answers is better: minutes'
	@echo 'make pipeline-demo  five stages in one line, a base, chats, rejection sampling, DPO and GRPO, on one page: minutes'
	@echo 'make test      the tests'
	@echo 'make test-slow the slow suite'
	@echo 'make test-all  the tests and the slow suite'
	@echo 'make test-soak more cases of what these sample, before a release'
	@echo 'make test-oldest the tests on the oldest versions that pyproject.toml allows, in .venv-oldest: gigabytes'
	@echo 'make test-vllm the tests with a real vLLM, in .venv-vllm: gigabytes'
	@echo 'make gpu       what one GPU does, the most valuable first, into benchmarks/gpu.md: 25 minutes'
	@echo 'make check     format, lint, types, layers, pages and their links'
	@echo 'make audit     known vulnerabilities of the pinned packages, where pip-audit and a network are'
	@echo 'make docs      the pages of docs/ as HTML, in build/docs'
	@echo 'make format    mend what ruff can mend'
	@echo 'make venv      the set-up alone: $(VENV) with the pinned packages'
	@echo 'make clean     remove $(VENV), runs/ and caches of tools'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'fulltune needs Python >= 3.11: make PYTHON=python3.11 $(MAKECMDGOALS)'; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): a few minutes the first time'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt 'torch>=2.11'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

venv: $(STAMP)

demo: $(STAMP)
	$(RUN) +exp=quickstart_base
	$(RUN) +exp=quickstart

preference-demo: demo
	$(RUN) +exp=quickstart_dpo
	$(BIN)/python -m tools.evaluate runs/quickstart_dpo --rows 0

pipeline-demo: $(STAMP)
	$(RUN) +pipeline=quickstart_pipeline

compare-demo: $(STAMP)
	$(RUN) +exp=quickstart_base
	$(RUN) -m +exp=compare_quickstart
	$(BIN)/python -m tools.evaluate runs/sweeps/compare_quickstart
	$(BIN)/python -m tools.compare runs/sweeps/compare_quickstart --html runs/sweeps/compare_quickstart/compare.html

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_prose.py
	@$(MAKE) --no-print-directory audit

# Of an advisory that has just come out nothing here is at fault: nothing is looked up unless pip-audit is installed.
audit: $(STAMP)
	@if ! $(BIN)/python -c 'import pip_audit' 2>/dev/null; then echo 'skipped: pip-audit is not installed, so no known vulnerabilities are looked up'; \
	elif ! timeout 20 $(BIN)/python -c 'import urllib.request; urllib.request.urlopen("https://pypi.org/pypi/pip/json", timeout=8)' 2>/dev/null; then \
	echo 'skipped: no network, so no known vulnerabilities are looked up'; \
	else $(BIN)/python -m pip_audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off; fi

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo 'open build/docs/index.html'

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A test waits much of its time, so two parts run at once; the tests on the one SLURM cluster are a part. Each prints when it has ended.
AT_ONCE := $(MAKE) --no-print-directory --jobs=2 --keep-going $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
QUICK := not slow and not soak
SLOW := slow and not soak
ON_SLURM = $(shell grep -l mark.slurm tests/test_*.py)

test: $(STAMP)
	@$(AT_ONCE) test-quick-1 test-quick-2 test-quick-slurm

test-slow: $(STAMP)
	@$(AT_ONCE) test-slow-slurm test-slow-1 test-slow-2

test-quick-1: $(STAMP)
	$(BIN)/python -m pytest -m '$(QUICK) and not slurm' tests/test_[a-o]*.py

test-quick-2: $(STAMP)
	$(BIN)/python -m pytest -m '$(QUICK) and not slurm' tests/test_[p-z]*.py

test-quick-slurm: $(STAMP)
	$(BIN)/python -m pytest -m '$(QUICK) and slurm' $(ON_SLURM)

test-slow-1: $(STAMP)
	$(BIN)/python -m pytest -m '$(SLOW) and not slurm' tests/test_[a-p]*.py

test-slow-2: $(STAMP)
	$(BIN)/python -m pytest -m '$(SLOW) and not slurm' tests/test_[q-z]*.py

test-slow-slurm: $(STAMP)
	$(BIN)/python -m pytest -m '$(SLOW) and slurm' $(ON_SLURM)

test-all: test test-slow

test-soak: $(STAMP)
	$(BIN)/python -m pytest -m soak

# A machine with a GPU has such versions: torch 2.11, transformers 5.17. Not part of .ci/run: it downloads gigabytes.
OLDEST := .venv-oldest
$(OLDEST)/.installed: pyproject.toml tests/oldest.py
	@$(PYTHON) -m venv $(OLDEST)
	@echo 'installing into $(OLDEST): gigabytes, where torch has no build for CPUs alone'
	@$(PYTHON) tests/oldest.py > $(OLDEST)/requirements.txt
	@$(OLDEST)/bin/python -m pip install --quiet --requirement $(OLDEST)/requirements.txt
	@$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

# TESTS=tests/test_x.py takes some of them.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m 'not slow and not soak' $(TESTS)

# vLLM for CPUs needs other versions of packages than .venv has. Not part of .ci/run: it downloads gigabytes.
VLLM := .venv-vllm
$(VLLM)/.installed: tests/vllm.txt
	@$(PYTHON) -m venv $(VLLM)
	@echo 'installing into $(VLLM): gigabytes, where torch has no build for CPUs alone'
	@$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement tests/vllm.txt
	@touch $@

test-vllm: $(STAMP) $(VLLM)/.installed
	FULLTUNE_VLLM=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm $(TESTS)

# On a machine without a network the packages are there already, and no .venv is made: docs/gpu.md.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tools.bench gpu --out benchmarks/gpu.md

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) runs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
