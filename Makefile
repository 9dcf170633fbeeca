# Everything runs from a virtual environment that these rules make themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.bench
DEMO ?= demo

.PHONY: demo paper recipes test test-long faults bench lint format clean

# The three commands on the example photos at 1024 x 1024, in the folder $(DEMO); see README.md.
demo: $(STAMP)
	mkdir -p $(DEMO)
	cd $(DEMO) && ../$(BIN)/mobilesam precompute --images ../examples/photos --out store.zarr --teacher vit_nano
	cd $(DEMO) && ../$(BIN)/mobilesam distill --epochs 12
	cd $(DEMO) && ../$(BIN)/mobilesam verify --split all --report report.html
	@echo "Look at $(DEMO)/report.html in a browser."

# The paper's comparisons in miniature, in the folder $(PAPER), into docs/PAPER.md; PART=recipe is one student of many
# pictures, by distill's own recipe. SCALE=small takes minutes, in paper-small, and leaves the document as it is.
PAPER ?= paper$(if $(SCALE),-$(SCALE))
paper: $(STAMP)
	$(BIN)/python examples/paper.py --out $(PAPER)$(if $(PART), --part $(PART))$(if $(SCALE), --scale $(SCALE))
	$(if $(SCALE),,$(BIN)/python examples/paper.py --out $(PAPER) --write-docs)

# Recipes of distillation side by side, in the folder $(RECIPES), into docs/RECIPE.md: days on 2 cores. A rerun resumes.
RECIPES ?= recipes
recipes: $(STAMP)
	$(BIN)/python -m benchmarks.recipes --out $(RECIPES)
	$(BIN)/python -m benchmarks.recipes --out $(RECIPES) --parts --steps 500 --seeds 0
	$(BIN)/python -m benchmarks.recipes --out $(RECIPES) --write-docs

# Two processes, a file's tests in one of them; files in order, since an early one takes longest.
test: lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Two processes here, too: each of them may need 8 GB of memory, for the largest teacher.
test-long: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not cuda"

# Every kill point, disk error and damage, counted from the lines that the tests write; test-long has a part of them.
FAULTS := .faults/full.jsonl
faults: export MOBILESAM_FAULTS := $(abspath $(FAULTS))
faults: $(STAMP)
	rm -f $(FAULTS)
	$(BIN)/pytest -n 2 --dist loadfile -m fault --kill-points full tests/faults
	PYTHONPATH=tests/support $(BIN)/python -m faults.summary --full $(FAULTS)

# Every ratio to a peer or a limit, into docs/PERFORMANCE.md. SCALE=1 adds the soaks, which take an hour.
BENCH := teacher store loader student pipeline footprint
bench: $(BENCH_STAMP)
	mkdir -p .bench
	set -e; for name in $(BENCH); do \
	    $(BIN)/python -m benchmarks.$$name --json > .bench/$$name.part; \
	    mv .bench/$$name.part .bench/$$name.json; \
	done
	$(if $(SCALE),$(BIN)/python -m benchmarks.scale)
	$(BIN)/python -m benchmarks.table

# mypy can't name a module by a folder with a dash: it checks the package through a link of the right name.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .mypy_path && ln -sfn .. .mypy_path/mobilesam
	MYPYPATH=.mypy_path $(BIN)/mypy -p mobilesam

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_path .mypy_cache .ruff_cache .pytest_cache .faults .bench
