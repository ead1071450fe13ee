# Everything from nothing: `make quickstart` and `make test` set up .venv first, and again only when what it is made of changes.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-all chaos mutations test-multinode test-gpu lint smollm2 wheel site notebooks benchmarks clean

PYTHON ?=
BIN := .venv/bin
SMOLLM2 := models/SmolLM2-135M-Instruct
NEED_GIB := 8
NEED_GIB_NVIDIA := 20

help:
	@cat <<-'EOF'
	make quickstart   train a tiny model with PPO on this machine, in minutes
	make test         unit, property, parity, architecture and integration tests
	make test-all     the slow ones too
	make chaos        kill and stop processes of small runs, hours of them, and print a table
	make test-multinode  those on several hosts made of network namespaces; needs root
	make test-gpu     those that need an NVIDIA GPU; some need two or three
	make lint         ruff, mypy, import contract
	make smollm2      put SmolLM2-135M-Instruct into models/ from a package, without a model hub
	make wheel        the package as a wheel, in dist/
	make site         the documentation as pages to browse, in build/site/html
	make notebooks    execute notebooks/ and store the outputs
	make benchmarks   run benchmarks/ (installs TRL to compare with)
	make setup        only create .venv
	make clean        remove .venv and caches; runs/ and models/ stay
	EOF

setup: .venv/installed

# Which engine: vLLM for CUDA where nvidia-smi finds a GPU, its CPU build elsewhere. uv does not read pip's settings, so a
# folder of wheels that pip knows of is passed on; without one, uv takes torch's CPU build from where torch publishes it.
.venv/installed: pyproject.toml
	@fail() { echo "make setup: $$1" >&2; exit 1; }
	[ "$$(uname -s)" = Linux ] || fail "needs Linux (found $$(uname -s)): vLLM's CPU build runs there only. Use a Linux machine or container."
	if [ ! -x $(BIN)/python ]; then
	  python=
	  for candidate in $(if $(PYTHON),'$(PYTHON)',python3.11 python3.12 python3); do
	    if "$$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null; then
	      python=$$candidate
	      break
	    fi
	  done
	  [ -n "$$python" ] || fail "needs Python 3.11 or 3.12 with its venv module; found $(if $(PYTHON),$(PYTHON) = )$$($(or $(PYTHON),python3) --version 2>&1 || true). Install python3.11 and python3.11-venv, or name one: make setup PYTHON=/path/to/python3.11"
	  need=$(NEED_GIB)
	  if nvidia-smi --list-gpus >/dev/null 2>&1; then need=$(NEED_GIB_NVIDIA); fi
	  free=$$(($$(df -Pk . | awk 'END { print $$4 }') / 1024 / 1024))
	  [ "$$free" -ge "$$need" ] || fail "needs $$need GiB of free disk for the environment, this folder's disk has $$free GiB. Free some space, or clone elsewhere."
	  "$$python" -m venv .venv
	fi
	$(BIN)/python -m pip install --quiet --upgrade uv
	options=()
	if nvidia-smi --list-gpus >/dev/null 2>&1; then
	  engine=nvidia
	else
	  engine=cpu
	fi
	wheels=$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true)}
	if [ -n "$$wheels" ]; then
	  export UV_FIND_LINKS=$$wheels UV_SYSTEM_CERTS=1
	elif [ $$engine = cpu ]; then
	  options+=(--torch-backend cpu)
	fi
	echo "make setup: installing into .venv for $$engine"
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python "$${options[@]}" --editable ".[$$engine,tasks,dev]"
	touch $@

quickstart: setup
	$(BIN)/rlhf quickstart

test: setup
	$(BIN)/pytest -n 2 --dist loadfile --durations=25

test-all: setup
	$(BIN)/pytest -m "not gpu and not chaos"

chaos: setup
	$(BIN)/pytest tests/chaos -m ""

mutations: setup
	$(BIN)/python -m tests.mutations

test-multinode: setup
	$(BIN)/pytest -m multinode

test-gpu: setup
	$(BIN)/pytest tests/gpu -m gpu

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

smollm2: $(SMOLLM2)/config.json

$(SMOLLM2)/config.json: | setup
	$(BIN)/rlhf models fetch smollm2 $(SMOLLM2)

wheel: setup
	rm -rf build/lib build/bdist.* dist/ray_rlhf-*.whl
	$(BIN)/uv build --quiet --wheel --no-build-isolation --python $(BIN)/python --out-dir dist
	ls dist/ray_rlhf-*.whl

site: setup
	$(BIN)/python scripts/site/build.py

notebooks: setup
	cd notebooks
	rm -rf runs
	../$(BIN)/jupyter-execute --inplace --timeout=900 --NotebookClient.record_timing=False *.ipynb

benchmarks: smollm2
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable ".[benchmarks]"
	for file in benchmarks/*.py; do
	  case "$$file" in
	    */timelines.py) continue ;; # it draws runs that exist already
	    */cookbook.py) continue ;; # it needs an environment with the tinker-cookbook
	    */view.py) options=(--folder runs/view-benchmark) ;;
	    *) options=() ;;
	  esac
	  $(BIN)/python "$$file" "$${options[@]}"
	done

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
