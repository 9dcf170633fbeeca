# Everything runs from a virtual environment that these rules make themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without setuptools' warning that the package lies in the repository's root, as it should.
INSTALL := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.demo
BENCH_STAMP := $(VENV)/.bench
DEMO ?= demo

.PHONY: demo demo-1024 paper recipes test test-long faults bench gpu lint format clean

# The three commands at 192 x 192, in the folder $(DEMO), on pictures of which a student learns in minutes; see README.md.
SHOW = cd $(DEMO) && ../$(BIN)/mobilesam
demo: $(DEMO_STAMP)
	@mkdir -p $(DEMO)
	@echo "1. Pictures: generated ones and crops of nine photos to learn from; others, and three photos, held out."
	$(BIN)/python examples/demo_pictures.py --out $(DEMO)/pictures
	@echo; echo "2. The teacher, once: its embeddings of all pictures go into a store, those to judge by into another."
	$(SHOW) precompute --images pictures/train --out store.zarr --teacher vit_nano --image-size 192
	$(SHOW) precompute --images pictures/held-out --out held-out.zarr --teacher vit_nano --image-size 192
	@echo; echo "3. The student learns the embeddings: the longest part."
	$(SHOW) distill --epochs 3 --batch-size 4
	@echo; echo "4. Is it good? Its masks beside the teacher's, on pictures that it has never seen."
	$(SHOW) verify --store held-out.zarr --split all --report report.html
	@echo; echo "5. The student at work, on a photo that it has never seen."
	$(SHOW) segment ../examples/photos/coffee.jpg --point 160 250 --out segment.png
	@echo; echo "Look at $(DEMO)/report.html in a browser, and at $(DEMO)/segment.png."

# The three commands on the example photos at 1024 x 1024: the real size, but twelve photos are few to learn from.
demo-1024: DEMO := demo-1024
demo-1024: $(DEMO_STAMP)
	@mkdir -p $(DEMO)
	$(SHOW) precompute --images ../examples/photos --out store.zarr --teacher vit_nano
	$(SHOW) distill --epochs 12
	$(SHOW) verify --split all --report report.html
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

# On a machine with a GPU: the tests marked `cuda`, and every speed there, into docs/PERFORMANCE.md, in ten minutes.
gpu: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks.gpu --write-docs

# mypy can't name a module by a folder with a dash: it checks the package through a link of the right name.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .mypy_path && ln -sfn .. .mypy_path/mobilesam
	MYPYPATH=.mypy_path $(BIN)/mypy -p mobilesam

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(STAMP): setup.cfg pyproject.toml | $(BIN)/python
	$(INSTALL) '.[test]'
	touch $@

# What the tests need takes minutes to install; the demo does without.
$(DEMO_STAMP): setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing mobilesam and torch into $(VENV)."
	$(INSTALL) '.[report]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(INSTALL) '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) demo-1024 build dist *.egg-info .mypy_path .mypy_cache .ruff_cache .pytest_cache .faults .bench
