# Two commands matter: `make demo` and `make test`. Both set up what they need and may be repeated. `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
export PYTHONDONTWRITEBYTECODE := 1
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help demo test cni setup setup-dev check lint types layers unit bpf netns envoy demo-test apiserver conformance e2e image bench protos format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: setup ## watch real packets and real Envoys behave as the policies say (root)
	@$(BIN)/meshbridge demo run

test: setup-dev cni check unit bpf netns envoy demo-test ## every check and test (root)
	@echo "test: all passed"

setup: ## what the demo needs: Debian packages, .venv, bpffs
	@scripts/setup run

setup-dev: ## what the tests need
	@scripts/setup dev

check: lint types layers ## lint, types, import layers (no root)

lint:
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files 'bpf/*.c' 'bpf/*.h' 'cni/*.c' | xargs -r $(BIN)/clang-format --dry-run --Werror

types:
	$(BIN)/mypy

layers:
	$(BIN)/lint-imports

unit: ## unit tests (no root)
	$(PYTEST) -n 2 tests/unit

cni: build/meshbridge-cni ## the CNI plugin, a static program for hosts

build/meshbridge-cni: cni/meshbridge-cni.c cni/build
	@mkdir -p build
	cni/build $@

bpf: ## the real BPF programs on single packets, and against the oracle (root)
	$(PYTEST) tests/bpf

netns: ## real veths, sockets and the agent in network namespaces (root)
	$(PYTEST) tests/netns

envoy: ## real Envoys with our configuration and our ext_authz (root)
	$(PYTEST) tests/envoy

demo-test: ## the whole walk of `make demo`, checked (root)
	$(PYTEST) tests/demo

apiserver: setup-dev ## verbs that read or change a cluster, against a real API server (root; builds it once)
	@scripts/third-party kubernetes helm
	$(PYTEST) tests/apiserver

conformance: setup-dev ## our verdicts against a real Envoy, istiod, Cilium's engine and others (root; builds them once)
	@scripts/third-party istio kubernetes $(dir $(wildcard tests/conformance/*/go.mod))
	$(PYTEST) tests/conformance

image: setup ## the container image, without a registry (root)
	@scripts/image

e2e: ## a real Kubernetes of two nodes with a real Istio on this machine (root; builds them once)
	@scripts/setup e2e
	@scripts/third-party istio kubernetes coredns
	$(PYTEST) --timeout 900 tests/image
	$(PYTEST) tests/e2e

bench: setup-dev ## the figures of docs/benchmarks.md, as ratios (root)
	@$(BIN)/meshbridge bench

protos: ## regenerate meshbridge/protos from protos/
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. protos/meshbridge/protos/*.proto
	@rm -f meshbridge/protos/agent_pb2_grpc.py

format: ## rewrite code in the project's format
	$(BIN)/ruff check --fix-only --exit-zero
	$(BIN)/ruff format
	git ls-files 'bpf/*.c' 'bpf/*.h' 'cni/*.c' | xargs -r $(BIN)/clang-format -i

clean: ## remove what the commands left in this folder
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
