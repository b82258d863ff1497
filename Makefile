# The literal commands of CONTRIBUTING.md and of CI. PYTHON names the interpreter to build with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per rank: three ranks share two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test bench check format types proto proto-check proto-baseline install dev clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

install: $(VENV)/.installed  ## Make .venv with what training needs

dev: $(VENV)/.installed-dev  ## Make .venv with what tests and checks need as well

demo: $(VENV)/.installed  ## Train two teachers and a student on handwritten digits (2T1S)
	$(BIN)/torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=3 -m switokd.train digits-2t1s

test: $(VENV)/.installed-dev  ## Run the tests, two at a time
	$(BIN)/pytest -n 2 --dist worksteal

bench: $(VENV)/.installed-dev  ## Measure against the plain loop and on simulated devices (50 min)
	$(BIN)/python -m bench

check: $(VENV)/.installed-dev types proto-check  ## Check format, lint, types and the wire contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed-dev  ## Format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format -w proto

# services/ is installed as switokd.services; mypy sees it there in a copy of the tree.
types: $(VENV)/.installed-dev
	rm -rf build/types && mkdir -p build/types
	cp -R switokd tests bench pyproject.toml build/types/ && cp -R services build/types/switokd/services
	cd build/types && $(CURDIR)/$(BIN)/mypy --cache-dir=$(CURDIR)/.mypy_cache -p switokd -p tests -p bench

define GENERATE
	$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=$(1) --grpc_python_out=$(1) \
	  --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc switokd/v1/coordinator.proto
endef

proto: $(VENV)/.installed-dev  ## Generate switokd/v1 from proto/
	$(call GENERATE,.)

proto-check: $(VENV)/.installed-dev
	$(BIN)/buf lint proto
	$(BIN)/buf format -d --exit-code proto
	$(BIN)/buf breaking proto --against proto/baseline.json
	rm -rf build/proto && mkdir -p build/proto
	$(call GENERATE,build/proto)
	diff -r -x __init__.py -x __pycache__ build/proto/switokd/v1 switokd/v1 \
	  || { echo 'switokd/v1 is not what proto/ generates: run make proto'; exit 1; }

proto-baseline: $(VENV)/.installed-dev  ## Accept the contract as it stands as the one not to break
	$(BIN)/buf build proto -o proto/baseline.json

clean:  ## Remove what was built (not .venv, not runs/)
	rm -rf build .mypy_cache .pytest_cache .ruff_cache switokd.egg-info
