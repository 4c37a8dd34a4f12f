# Two commands: `make tune` and `make test`. Both set up .venv first; nothing has to be typed before.
#
#   TORCH=auto|cpu|cuda   which torch to install; auto looks for an NVIDIA GPU
#   TORCH_CPU, TORCH_CUDA the requirements behind the two, e.g. TORCH_CUDA='torch==2.11.0'
#   PRESET, ARGS          what `make tune` tunes (gqa16-d128 with a GPU, tiny without), and further options; also those of
#                         `make bench`, and of all scripts of `make tables`, such as ARGS='--db sqlite:///tuned.sqlite'
#   JOBS, PYTEST_ARGS     processes of `make test`, and further options of pytest
#   PARTS                 processes of `make sanitize`, which share a GPU
#   PYTHON, VENV          the interpreter (3.11 or newer) and the folder of the environment

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
TORCH ?= auto
TORCH_CPU ?= torch==2.13.0
TORCH_CUDA ?= torch
PYTEST_ARGS ?=
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
ARGS ?=
PARTS ?= 6

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes || echo no)
BUILD := $(if $(filter auto,$(TORCH)),$(if $(filter yes,$(GPU)),cuda,cpu),$(TORCH))
ifeq ($(filter cpu cuda,$(BUILD)),)
$(error TORCH must be auto, cpu or cuda; got TORCH=$(TORCH))
endif
PRESET ?=
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

BIN := $(VENV)/bin
REQUIREMENT := $(if $(filter cpu,$(BUILD)),$(TORCH_CPU),$(TORCH_CUDA))
STAMP := $(VENV)/.ready-$(BUILD)

.PHONY: help setup tune test test-gpu test-browser fuzz kill sanitize bench tables lint format goldens wheel smoke clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
	@echo "targets: setup tune test test-gpu test-browser fuzz kill sanitize bench tables lint format goldens wheel smoke clean"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; none was found. Name one: make PYTHON=/path/to/python3." >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@if compgen -G "$(VENV)/.ready-*" >/dev/null && [ ! -e $@ ]; then $(BIN)/python -m pip uninstall --quiet --yes torch; fi
	@rm -f $(VENV)/.ready-*
	$(BIN)/python -m pip install --quiet "$(REQUIREMENT)"
	$(BIN)/python -m pip install --quiet --editable ".[test,dev]"
	@touch $@

tune: $(STAMP)  ## the main job
	$(BIN)/nsa-autotune tune $(if $(PRESET),--preset $(PRESET)) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest tests/cpu -n $(JOBS) $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu $(PYTEST_ARGS)

test-browser: $(STAMP)  ## needs chromium with its driver: apt-get install chromium chromium-driver
	$(BIN)/python -m pip install --quiet --editable ".[browser]"
	$(BIN)/python -m pytest tests/cpu/test_report_browser.py $(PYTEST_ARGS)

fuzz: $(STAMP)  ## 10,000 hostile files, where `make test` tries a hundred
	HYPOTHESIS_EXAMPLES=10000 $(BIN)/python -m pytest tests/cpu/test_db_fuzz.py $(PYTEST_ARGS)

kill: $(STAMP)  ## SIGKILL at 200 points of tuning runs, where `make test` tries a few
	KILL_POINTS=200 $(BIN)/python -m pytest tests/cpu/test_kill.py $(PYTEST_ARGS)

sanitize: $(STAMP)  ## memory errors and races of every structure and shipped winner, by the CUDA toolkit's checker
	for tool in memcheck racecheck; do \
		seq 0 $$(($(PARTS) - 1)) | xargs -P $(PARTS) -I{} compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(BIN)/python tests/gpu/launch_all.py {}/$(PARTS) || exit 1; \
	done

bench: $(STAMP)
	$(BIN)/nsa-autotune bench $(ARGS)

define TABLES
forward.py --preset gqa16-d128,paper-27b --module
forward.py --preset gqa16-d128,paper-27b --dtype float16
training.py --module
training.py --dtype float16
training.py --small-groups --memory
decode.py
decode.py --cache-dtype fp8
endef
export TABLES

tables: $(STAMP)  ## the pages of forward, training and decode in benchmarks/results, all of them whatever one of them lacks
	@status=0; while read -r page; do echo "benchmarks/$$page"; \
		$(BIN)/python benchmarks/$$page $(ARGS) </dev/null || status=$$?; \
	done <<<"$$TABLES"; exit $$status

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

goldens: $(STAMP)  ## accept what the templates render now
	$(BIN)/nsa-autotune render --write

wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .

smoke: wheel
	scripts/wheel_smoke.sh $(BIN)/python dist/*.whl

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
