# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-torch-$(TORCH)
DEV := $(VENV)/.dev-torch-$(TORCH)
# One process more than there are cores: tests of SLURM and of signals mostly wait.
PROCESSES ?= $(shell expr $$(nproc) + 1)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(PROCESSES) --dist=loadfile

RANGES := .venv-oldest .venv-newest

.PHONY: quickstart test test-night test-fast test-ranges lint wheel clean

quickstart: $(READY) ## SFT and DPO of a tiny model, under 3 minutes after set-up
	$(BIN)/alignctl train recipe=quickstart

test: $(DEV) ## the test suite, a file on each core; with a real SLURM where it may be installed
	-scripts/slurm_test_cluster.sh install
	$(PYTEST) --no-loadscope-reorder --durations=40 -m "not night"

test-night: $(DEV) ## what repeats at random or is heavy: kills at random moments, the wheel, cells of the tables
	-scripts/slurm_test_cluster.sh install --accounts
	$(PYTEST) --no-loadscope-reorder --durations=20 -m night

test-fast: $(DEV) ## what answers within a minute
	$(PYTEST) -m "not slow and not train and not night"

test-ranges: $(RANGES:=/.ready) ## what is not slow, with the oldest and with the newest packages that may be there
	status=0; for venv in $(RANGES); do \
	  OMP_NUM_THREADS=1 $$venv/bin/python -m pytest -m "not slow and not night" || status=1; \
	done; exit $$status

lint: $(DEV)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(RANGES) dist build

# torch goes first, by itself and pinned: otherwise another package's open range pulls the newest CUDA build.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "alignctl needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	echo 'torch==$(TORCH)' >> $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable .
	rm -f $(VENV)/.ready-torch-* $(VENV)/.dev-torch-*
	touch $(READY)

# Of the ranges in pyproject.toml: the oldest have their lower bounds as constraints, the newest none.
$(RANGES:=/.ready): .venv-%/.ready: pyproject.toml scripts/ranges.py
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	if [ $* = oldest ]; then $(PYTHON) scripts/ranges.py pyproject.toml; fi > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  --constraint .venv-$*/constraints.txt --editable '.[dev]'
	touch $@

# What only tests need.
$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $(DEV)
