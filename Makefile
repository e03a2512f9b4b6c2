# Two commands set everything up: `make demo` and `make test`. Both make a virtual environment in .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# torch's CUDA build is several GB: take it only where there is an NVIDIA GPU. Override with TORCH=torch==X.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo "torch>=2.11" || echo "torch==2.13.0")
# On a machine without a GPU the kernels run in Triton's interpreter; CUDA builds of torch bring their own Triton.
EXTRAS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo "dev" || echo "dev,interpreter")

# Two processes: whole files of tests each, some of which share what is slow to make. Empty for one.
PARALLEL ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder --max-worker-restart=1

.PHONY: demo test quality style docs env clean

# Set up anew when the project's requirements change. The page alone needs a part of what the tests need.
# setuptools warns of every editable installation; the page's address should be the first thing to read.
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet

$(VENV)/.torch: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	touch $@

$(VENV)/.ready: $(VENV)/.torch
	$(PIP) --editable ".[$(EXTRAS)]"
	touch $@ $(VENV)/.ready-demo

$(VENV)/.ready-demo: $(VENV)/.torch
	$(PIP) --editable ".[demo]"
	touch $@

env: $(VENV)/.ready

demo: $(VENV)/.ready-demo
	$(BIN)/python -m demo.app $(ARGS)

test: env
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

quality: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A virtual environment of its own: the site is made from the sources, which are read and not imported.
$(VENV)-docs/.ready: pyproject.toml
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/python -m pip install --quiet --requirement $(VENV)-docs/requirements.txt
	touch $@

docs: $(VENV)-docs/.ready
	$(VENV)-docs/bin/python -m mkdocs build --strict $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-docs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
