# `make` prints the targets. Everything runs in one virtual environment that is made on first use; an environment that is
# already active is left alone (VENV=$VIRTUAL_ENV uses it, VENV= uses PYTHON's packages as they are and installs nothing).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
PY = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
STAMPS = $(if $(VENV),$(VENV)/.wsss,build/stamps)
PYTEST = $(PY) -m pytest -q
EXTRAS = test,lint
CMAKE_BUILD = build/cmake
EMULATOR = $(CURDIR)/$(CMAKE_BUILD)/libwsss_emulator.so
NATIVE = $(shell find csrc -type f) setup.py
SETTINGS = $(WSSS_BUILD) $(TORCH_CUDA_ARCH_LIST)
ifneq ($(VENV),)
export PATH := $(abspath $(VENV))/bin:$(PATH)
else
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables: PYTHON (a Python >= 3.10), VENV (default .venv), WSSS_BUILD=auto|cpu|cuda|none, TORCH_CUDA_ARCH_LIST, MAX_JOBS"

# The environment. Each step leaves a stamp, so that a second call does nothing until its sources change.
$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "make: Python 3.10 or newer is needed; none was found on PATH. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is not Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/torch: $(if $(VENV),$(VENV)/bin/python)
	@mkdir -p $(@D)
	$(if $(VENV),$(PY) -m pip install "torch>=2.10" "setuptools>=77" "pybind11>=2.12" ninja)
	@touch $@

# Metadata first, then the libraries in place: --force hands the
# work to ninja, which recompiles only what a change in csrc touches.
$(STAMPS)/installed: $(STAMPS)/torch pyproject.toml
	$(if $(VENV),WSSS_BUILD=none $(PY) -m pip install --no-build-isolation -e ".[$(EXTRAS)]")
	@touch $@

$(STAMPS)/settings: FORCE
	@mkdir -p $(@D)
	@echo "$(SETTINGS)" | cmp -s - $@ || echo "$(SETTINGS)" > $@

$(STAMPS)/built: $(STAMPS)/installed $(STAMPS)/settings $(NATIVE)
	@echo "compiling, several minutes (progress in build.log)"
	$(PY) setup.py build_ext --inplace --force > build.log 2>&1 || { cat build.log >&2; exit 1; }
	@mkdir -p build && mv build.log build/build.log && grep "^wsss_kernels build" build/build.log
	@touch $@

install: $(STAMPS)/built ## the virtual environment with the package and everything that the other targets need

demo: $(STAMPS)/built ## refines photographs and shows our time and memory against the eager algorithm
	$(PY) -m wsss_models.demo

MATRIX = tests/test_ops.py tests/test_gradients.py tests/test_layouts.py
# Tests of time and of process memory run alone; all others share the cores.
ALONE = tests/test_dispatch.py tests/test_import.py tests/test_memory.py tests/test_process_memory.py
SHARED_OUT = $(PYTEST) -n $(shell nproc) --dist worksteal -m "not slow"
test: $(STAMPS)/built ctest ## the whole suite (slow tests excepted), at every instruction-set level, in the emulators, and ctest
	$(SHARED_OUT) $(ALONE:%=--ignore=%)
	$(PYTEST) -m "not slow" $(ALONE)
	@echo "== CPU kernels at the lower instruction-set levels"
	WSSS_CPU_CAPABILITY=avx2 $(SHARED_OUT) tests/test_ops.py -k "cpu and (float32 or float64)"
	WSSS_CPU_CAPABILITY=default $(SHARED_OUT) tests/test_ops.py -k "cpu and (float32 or float64)"
	@echo "== CUDA kernels in the emulator, Triton kernels in the interpreter"
	for order in forward reverse 7; do \
	    WSSS_EMULATOR_ORDER=$$order WSSS_CUDA_EMULATOR="$(EMULATOR)" $(SHARED_OUT) $(MATRIX) tests/test_golden.py -k cuda; \
	done
	TRITON_INTERPRET=1 $(SHARED_OUT) $(MATRIX) tests/test_golden.py -k triton
	@echo "== CPU and CUDA kernels under AddressSanitizer and UBSan"
	cmake -G Ninja -S . -B build/cmake-asan -DPython3_EXECUTABLE=$$(command -v $(PY)) -DWSSS_SANITIZE=address,undefined
	cmake --build build/cmake-asan --target wsss_emulator
	WSSS_CUDA_EMULATOR="$(CURDIR)/build/cmake-asan/libwsss_emulator.so" \
	    tests/asan.sh $(PY) tests/test_ops.py -n $(shell nproc) -m "not slow" -k "(cpu or cuda) and float32"

test-fast: $(STAMPS)/built ## the Python suite once, without the slow tests
	$(PYTEST) -x -m "not slow"

test-full: test cpp asan ## `test`, the slow tests (installs in fresh environments) and `asan`
	$(PYTEST) -m slow

$(CMAKE_BUILD)/configured: CMakeLists.txt $(STAMPS)/installed
	cmake -G Ninja -S . -B $(CMAKE_BUILD) -DPython3_EXECUTABLE=$$(command -v $(PY))
	@touch $@

cpp: $(CMAKE_BUILD)/configured ## with CMake: the operator library, the CUDA emulator library, the C++ tests
	cmake --build $(CMAKE_BUILD)

ctest: $(CMAKE_BUILD)/configured ## the C++ tests, and the CUDA emulator library for the Python tests
	cmake --build $(CMAKE_BUILD) --target cpp_tests wsss_emulator
	ctest --test-dir $(CMAKE_BUILD) --output-on-failure --no-tests=error

asan: $(STAMPS)/installed ## the operators' tests and the C++ tests under AddressSanitizer and UBSan
	cmake -G Ninja -S . -B build/cmake-asan -DPython3_EXECUTABLE=$$(command -v $(PY)) -DWSSS_SANITIZE=address,undefined
	cmake --build build/cmake-asan --target cpp_tests wsss_emulator
	ASAN_OPTIONS=detect_leaks=0 ctest --test-dir build/cmake-asan --output-on-failure --no-tests=error
	for level in avx512 avx2 default; do \
	    WSSS_CPU_CAPABILITY=$$level WSSS_CUDA_EMULATOR="$(CURDIR)/build/cmake-asan/libwsss_emulator.so" \
	        tests/asan.sh $(PY) $(MATRIX) tests/test_golden.py tests/test_determinism.py -n $(shell nproc) -m "not slow"; \
	done

lint: $(STAMPS)/installed ## ruff, clang-format and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run -Werror $$(git ls-files -co --exclude-standard 'csrc/*' 'tests/cpp/*')
	$(PY) -m mypy

format: $(STAMPS)/installed ## rewrites the sources as `lint` wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $$(git ls-files -co --exclude-standard 'csrc/*' 'tests/cpp/*')

bench: $(STAMPS)/built ## our operators against the released algorithms (OP=par: one operator)
	$(PY) benchmarks/run.py $(if $(OP),--op $(OP))

gpu: $(STAMPS)/installed ## build, tests, sanitizers, benchmark on a GPU (PART=build|tests|sanitize|bench, OPS=par,mpfp, REHEARSE=1)
	$(PY) benchmarks/gpu.py $(if $(PART),--part $(PART)) $(if $(OPS),--ops $(OPS)) $(if $(REHEARSE),--rehearse)

new-op: $(STAMPS)/built ## the folders of a new operator (NAME=my_operator)
	@[ -n "$(NAME)" ] || { echo "make new-op: say which: make new-op NAME=my_operator" >&2; exit 1; }
	$(PY) -m wsss_kernels.new_op "$(NAME)"
	$(PY) -m ruff format -q wsss_kernels/ops/$(NAME)
	clang-format -i csrc/ops/$(NAME)/*
	$(MAKE) install
	$(PY) benchmarks/report.py

clean: ## removes what was built; the virtual environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks demo_output
	rm -f wsss_kernels/*.so $(STAMPS)/built
	find csrc wsss_kernels wsss_models tests benchmarks -name __pycache__ -type d -exec rm -rf {} +

.PHONY: help install demo test test-fast test-full cpp ctest asan lint format bench gpu new-op clean FORCE
