# Everything a developer runs. `make help` lists the targets; each sets up what it needs.
#
# PYTHON       the Python (3.10 or newer) that .venv is made with            default: python3
# VENV         where the virtual environment is                              default: .venv
# TORCH_INDEX  where to find PyTorch, if not in the default package index: for the CPU build
#              TORCH_INDEX=https://download.pytorch.org/whl/cpu
# ARGS         more arguments for pytest                                     e.g. ARGS="-k cli"
# ARCHITECTURES  what `make plugin` compiles for, e.g. "87-real;90", into a folder of its own; the tests then take
#              DIJIANG_TEST_ARCHITECTURES, its default, to be the same     default: all that nvcc knows
# JOBS         compilers at a time                                           default: one per CPU
# TRT_INCLUDE  folders with TensorRT's headers for `make plugin-headers`     e.g. /opt/trt-8.6/include:/opt/trt-11.1/include
# RTX_RECORD   a file that `make rtx-test` adds a line to for each plan      e.g. docs/evidence/rtx-builds.txt
# ENGINE_PYTHON  the Python that has TensorRT, for `make engine-test`          default: that of .venv
# ENGINE_TEST  more options of tests/gpu/engine_test.py                      e.g. ENGINE_TEST="--dtypes float16"
# KERNELS      more options of `make bench-kernels`                          e.g. KERNELS="--shape 32x128"
# FORM         of `make test-arm64`: whole, or short as in CI                 default: whole
# PYTHONS      versions for `make test-pythons`                               default: 3.10 3.12 3.13
# SHAPES       what `make bench-export` exports                              default: 410M, 1B and 2.8B

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
ARCHITECTURES ?= $(DIJIANG_TEST_ARCHITECTURES)
JOBS ?= $(shell nproc)
TRT_INCLUDE ?=
RTX_RECORD ?=
KERNELS ?=
FORM ?= whole
PYTHONS ?= 3.10 3.12 3.13
SHAPES ?= pythia-410m pythia-1b pythia-2.8b

BIN := $(VENV)/bin
ENGINE_PYTHON ?= $(BIN)/python
ENGINE_TEST ?=
CLI := $(BIN)/dijiang-export
INSTALLED := $(VENV)/.installed
BUNDLE := build/demo/tiny-stdlib.bundle
# The folder that tests/support/makers/plugin_builds.py uses too.
PLUGIN := build/plugin$(addprefix -,$(subst ;,-,$(ARCHITECTURES)))
PROMPT := def read_file(path):
# For as many tests at a time as there are cores: threads of PyTorch and ONNX Runtime that spin while they wait for
# each other take those of other tests.
SHARING := OMP_NUM_THREADS=1 DIJIANG_SPINNING=off

EXPORT_SOURCES := $(shell find exporter/dijiang_export engines/dijiang_engines samples/tiny-stdlib -type f \
	! -path '*/__pycache__/*' 2>/dev/null)

.PHONY: help setup demo test test-pythons test-arm64 lint format plugin plugin-headers bindings registry-test rtx-test engine-test bench bench-export bench-kernels clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make the virtual environment, with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt .ci/setup_venv.py
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: there is no $(PYTHON)"; \
		echo "hint: apt-get install python3, or name another: make PYTHON=... $(MAKECMDGOALS)"; exit 1; } >&2
	@$(PYTHON) .ci/setup_venv.py --venv $(VENV) --torch-index "$(TORCH_INDEX)"
	@touch $@

demo: $(BUNDLE)/manifest.json ## export the trained sample, validate the result, generate text
	@echo
	@echo "== Compare ONNX Runtime with the cases that were recorded from PyTorch"
	$(CLI) validate $(BUNDLE)
	@echo
	@echo "== Generate, with ONNX Runtime alone"
	$(CLI) generate $(BUNDLE) --echo --prompt '$(PROMPT)' --max-tokens 80 --temperature 0.7 --top-p 0.9 --seed 3

$(BUNDLE)/manifest.json: $(EXPORT_SOURCES) | $(INSTALLED)
	@echo "== Export the sample checkpoint, a small DiJiang model of Python code, to ONNX"
	@mkdir -p $(dir $(BUNDLE))
	$(CLI) to-onnx samples/tiny-stdlib $(BUNDLE) --force

test: $(INSTALLED) ## all tests, on all cores
	$(SHARING) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-pythons: $(BUNDLE)/manifest.json ## the tests that need no PyTorch, on the other PYTHONS that are here
	rm -rf build/wheel
	$(BIN)/python -m hatchling build -t wheel -d build/wheel
	$(BIN)/python .ci/test_pythons.py --wheel build/wheel/*.whl --bundle $(BUNDLE) --least 1300 $(if $(CI),--require) $(PYTHONS)

test-arm64: $(BUNDLE)/manifest.json ## compile for arm64 and run it under qemu; TRT_INCLUDE: the plugin too (fetches 300 MB)
	rm -rf build/arm64-wheel
	$(BIN)/python -m hatchling build -t wheel -d build/arm64-wheel
	$(BIN)/python .ci/fetch_arm64.py --form $(FORM) --wheel build/arm64-wheel/*.whl build/arm64
	env -u MAKEFLAGS -u MAKELEVEL $(SHARING) DIJIANG_ARM64=$(FORM) DIJIANG_TENSORRT_INCLUDE="$(TRT_INCLUDE)" \
		$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -rs tests/arm64 $(ARGS)

lint: $(INSTALLED) ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff format and sort
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

plugin: ## compile the CUDA kernels for every architecture, or ARCHITECTURES, into build/plugin…
	cmake -S plugins -B $(PLUGIN) -DDIJIANG_WARNINGS_AS_ERRORS=ON -DCMAKE_CUDA_ARCHITECTURES="$(ARCHITECTURES)"
	env -u MAKEFLAGS -u MAKELEVEL cmake --build $(PLUGIN) --parallel $(JOBS)

plugin-headers: $(INSTALLED) ## compile the TensorRT plugin against the headers in each of TRT_INCLUDE
	env -u MAKEFLAGS -u MAKELEVEL $(BIN)/python .ci/plugin_headers.py --jobs $(JOBS) "$(TRT_INCLUDE)"

bindings: $(INSTALLED) ## fetch TensorRT's Python bindings and TensorRT for RTX for the tests (150 MB)
	$(BIN)/python .ci/fetch_wheels.py build/tensorrt-wheels

registry-test: $(INSTALLED) ## drive the plugin through the registries of TensorRT's lean runtimes (fetches 90 MB)
	$(BIN)/python plugins/tests/fetch_lean.py build/tensorrt-lean
	DIJIANG_TENSORRT_INCLUDE="$(TRT_INCLUDE)" $(BIN)/python -m pytest tests/nvidia/test_tensorrt_registry.py $(ARGS)

rtx-test: $(INSTALLED) ## build plans of every geometry with TensorRT for RTX; with TRT_INCLUDE also with the plugin (fetches 240 MB)
	$(BIN)/python .ci/fetch_wheels.py build/tensorrt-wheels --list .ci/rtx-wheels.txt
	DIJIANG_RTX_MATRIX=1 DIJIANG_RTX_RECORD="$(RTX_RECORD)" DIJIANG_TENSORRT_INCLUDE="$(TRT_INCLUDE)" $(SHARING) \
		$(BIN)/python -m pytest tests/building/test_rtx_builds.py tests/nvidia/test_rtx_bindings.py tests/runners/test_ort_rtx.py $(ARGS)

engine-test: $(INSTALLED) ## build and check TensorRT engines of the sample here (needs TensorRT and an NVIDIA GPU)
	env -u MAKEFLAGS -u MAKELEVEL $(BIN)/python tests/gpu/engine_test.py \
		--engine-python "$(ENGINE_PYTHON)" --work build/engine-test $(ENGINE_TEST)

bench: $(BUNDLE)/manifest.json ## speed of the sample and of a 160M shape, beside PyTorch's
	@mkdir -p build/bench
	$(CLI) bench $(BUNDLE) --checkpoint samples/tiny-stdlib --save build/bench/tiny-stdlib.json
	$(CLI) bench export --shape pythia-160m --dtype float32 --run --save build/bench/pythia-160m.json

bench-export: $(INSTALLED) ## time and memory of exporting larger SHAPES, float16 (needs disk space)
	@mkdir -p build/bench
	for shape in $(SHAPES); do \
		$(CLI) bench export --shape $$shape --save build/bench/export-$$shape.json; done

bench-kernels: $(INSTALLED) ## the CUDA kernels beside other implementations (needs an NVIDIA GPU)
	@mkdir -p build/bench
	$(CLI) bench kernels --save build/bench/kernels.json $(KERNELS)

clean: ## remove what was built; the virtual environment stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find exporter engines samples tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)
