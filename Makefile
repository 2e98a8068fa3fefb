.PHONY: help demo test check bench bench-small load faults soak monitoring image sbom
PYTHON ?= python3
DATA ?= $(error DATA: where CIFAR-10 is: a tar with train/CLASS/*.jpg and test/CLASS/*.jpg, or torchvision:CIFAR10:ROOT)
BIN := .venv/bin
HELM_SDKPY := 0.1.32 # asks for Python 3.12, runs on 3.11
CYCLONEDX_BOM := $(shell sed -n 's/^ARG CYCLONEDX_BOM=//p' Dockerfile)

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/installed ## the whole story on an embedded default: train, poison, fit, serve, attack, report
	$(BIN)/guard demo --report report

test: .venv/installed ## the tests: side by side, then those that want the machine for themselves
	$(BIN)/python -m pytest -m 'not alone' --numprocesses=auto --maxprocesses=8 --dist=loadfile
	$(BIN)/python -m pytest -m alone

check: .venv/installed ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

monitoring: .venv/installed ## an endpoint, Prometheus and Alertmanager: clean traffic, an attack, the alert
	$(BIN)/python -m deployments.monitoring

bench: .venv/installed ## what the twin costs: original pass against both, per type and mode
	$(BIN)/python -m benchmarks.twin_cost

bench-small: .venv/installed ## the laboratory on a CPU: six networks, each defence on each; DATA=cifar10.tar.xz or torchvision:CIFAR10:ROOT
	$(BIN)/python -m benchmarks.lab run small --data $(DATA)

load: .venv/installed ## what the guard costs under load, with tables and plots in load/
	$(BIN)/python -m benchmarks.load

faults: .venv/installed ## replicas killed and settings changed under load: every answer checked
	$(BIN)/python -m benchmarks.faults

soak: .venv/installed ## an hour of clients with all kinds of manners: no stall, nothing lost
	$(BIN)/python -m benchmarks.soak

image: ## the container image, backdoor-guard; for CUDA: make image TORCH_INDEX=https://pypi.org/simple TAG=cuda
	docker build --tag backdoor-guard:$(or $(TAG),latest) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) .

sbom: .venv/installed .venv-sbom/installed ## the packages of .venv as a CycloneDX document, sbom.cdx.json
	.venv-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file sbom.cdx.json $(BIN)/python

.venv-sbom/installed: Dockerfile
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==$(CYCLONEDX_BOM)
	touch $@

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv || { echo 'make: $(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python helm-sdkpy==$(HELM_SDKPY) || \
	  echo 'make: helm-sdkpy is not to be had for this machine: the tests of the chart are skipped' >&2
	touch $@
