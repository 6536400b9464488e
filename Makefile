# make demo   the whole pipeline on handwritten digits, four to ten minutes on two CPU cores after the installation
# make scaling-demo   six sizes on codes of known entropy, fitted and reported: 16 minutes on two CPU cores
# make test   the fast tests        make test-slow   the MLflow page in a browser        make lint   ruff, mypy
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
INSTALLED := .venv/.installed

.PHONY: demo scaling-demo test test-slow test-faults test-slurm fuzz lint install clean

demo: install
	$(BIN)/python launchers/demo.py

# what is done already is not done again
SYNTHETIC := configs/synthetic
scaling-demo: install
	$(BIN)/python launchers/synthesize_codes.py --config $(SYNTHETIC)/source.yaml
	$(BIN)/python launchers/scaling_study.py run --config $(SYNTHETIC)/scaling_study.yaml
	$(BIN)/python launchers/scaling_study.py fit --config $(SYNTHETIC)/scaling_study.yaml
	$(BIN)/python launchers/scaling_study.py report --config $(SYNTHETIC)/scaling_study.yaml

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/pip install -q -c constraints.txt -e .[browser]
	$(BIN)/python -m pytest -m slow

test-faults: install
	$(BIN)/python -m pytest -m faults -s

# as root, with apt-get install --no-install-recommends slurm-wlm munge
test-slurm: install
	$(BIN)/python -m pytest -m slurm

# FUZZ_SECONDS for each format that may come from elsewhere; what it finds goes to build/fuzz
FUZZ_SECONDS ?= 60
fuzz: install
	$(BIN)/pip install -q -c constraints.txt -e .[fuzz]
	for target in $(notdir $(wildcard tests/fuzz/corpus/*)); do \
	  $(BIN)/python tests/fuzz/fuzz.py $$target $(FUZZ_SECONDS) || exit 1; \
	done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy models data_pipeline training launchers

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON); install Python 3.11 or newer, e.g. apt-get install python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or newer is needed; install it and run make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
	  || { echo "error: Python's venv is missing; install it, e.g. apt-get install python3-venv" >&2; exit 1; }
	@command -v c++ > /dev/null || command -v g++ > /dev/null \
	  || { echo "error: no C++ compiler, DeepSpeed builds its communication with one; install it, e.g. apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || { echo "error: Python's headers are missing, DeepSpeed builds with them; install them, e.g. apt-get install python3-dev" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch setuptools wheel
	$(BIN)/pip install -q -c constraints.txt -e .[test]
	@touch $@

# keeps runs/ and data/: those are yours
clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
