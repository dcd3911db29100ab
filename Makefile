# make demo | test | test-all | check | gpu-check — each does its own set-up in .venv. pip's own environment variables are honoured.
PYTHON ?= python3
# Which torch: a pip requirement, or `site` to keep the one that $(PYTHON) imports.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: install demo test test-all gpu-check check format clean cluster-up cluster-down

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
		f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make ... PYTHON=/path/of/a/newer/python3")'
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
ifeq ($(TORCH),site)
	# The site's packages come behind our own on the path.
	$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' > $(VENV)/site.pth
	mv $(VENV)/site.pth "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/"
else
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt "$(TORCH)"
endif
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e ".[dev]"
	touch $(STAMP)

# Without a GPU two ranks of one thread each make the most of two cores; with GPUs, every one of them is a rank.
RANKS ?= $(if $(shell command -v nvidia-smi),,parallel.processes_per_node=2)

demo: $(STAMP)
	$(BIN)/dist-train run ticket_routing/demo $(RANKS)

# Test files run beside each other, the longest first (tests/conftest.py); most wait for processes of their own.
WORKERS ?= 3
BESIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(BIN)/python -m pytest -q $(BESIDE) -m "not matrix"

test-all: $(STAMP)
	$(BIN)/python -m pytest -q $(BESIDE)

# A real Slurm on this machine, to try things on (docs/slurm.md). Needs root and Slurm's packages.
cluster-up:
	tests/cluster/up.sh

cluster-down:
	tests/cluster/down.sh

# Every strategy on one NVIDIA GPU, from the generated configs; prints a table for docs/LOG.md.
gpu-check: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu tests/test_gpu.py
	$(BIN)/python -m benchmarks.gpu_check

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
