# make demo | test | check — each does its own set-up in .venv. pip's own environment variables are honoured.
PYTHON ?= python3
# Which torch: a pip requirement, or `site` to keep the one that is installed beside this Python.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: install demo test check format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
ifeq ($(TORCH),site)
	$(PYTHON) -m venv --system-site-packages $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
else
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt "$(TORCH)"
endif
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e ".[dev]"
	touch $(STAMP)

# Without a GPU two ranks of one thread each make the most of two cores; with GPUs, every one of them is a rank.
RANKS ?= $(if $(shell command -v nvidia-smi),,parallel.processes_per_node=2)

demo: $(STAMP)
	$(BIN)/dist-train run ticket_routing/demo $(RANKS)

test: $(STAMP)
	$(BIN)/python -m pytest -q

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
