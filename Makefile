# Two commands do everything: `make run` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1

.PHONY: run test lab export proof clean
run: .venv/ready          ## the main job: SFT to report
	$(BIN)/vlmrlhf run

test: .venv/ready         ## all tests, then every chapter from top to bottom
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/nbdev-test --n-workers 2 --timing

lab: .venv/ready          ## JupyterLab: chapters in nbs/, exercises/ beside them
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/00_start.ipynb

export: .venv/ready       ## chapters to modules
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean

proof: .venv/ready        ## kills, sabotage, then every mutant: minutes, recorded in tests/proofs.json
	$(BIN)/python tests/kill.py --kills 30 --scale smoke
	$(BIN)/python tests/sabotage.py
	$(BIN)/python tests/mutants.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
