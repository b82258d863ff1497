# The literal commands of CONTRIBUTING.md and of CI. PYTHON names the interpreter to build with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per rank: three ranks share two cores.
export OMP_NUM_THREADS ?= 1
comma := ,

.PHONY: help demo test simulate soak cover cover-units matrix bench check lock format imports types tree \
  docs audit k8s proto proto-check proto-baseline install dev clean

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
	$(BIN)/switokd train digits-2t1s

# CI's machines are shared. A test that fails among others there gets a second chance, alone; CI prints
# both results, so that nobody takes it for a test that always passes.
AGAIN := $(if $(CI),|| $(BIN)/pytest --last-failed --last-failed-no-failures none)

# Three at a time on two cores: a third of their time the tests wait.
test: $(VENV)/.installed-dev  ## Run the tests, three at a time
	$(BIN)/pytest -n 3 --dist worksteal $(AGAIN)

SEEDS ?= 100
simulate: $(VENV)/.installed-dev  ## Simulate SEEDS runs of the coordinator's protocol under random faults
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

FAULTS ?= 1000
SEED ?= 0
soak: $(VENV)/.installed-dev  ## Train short runs under FAULTS random faults that really kill (an hour)
	$(BIN)/python -m tests.faults.soak --faults $(FAULTS) --seed $(SEED)

# Tests that start processes are counted too: coverage follows every Python process.
cover: $(VENV)/.installed-dev  ## Run the tests and report line and branch coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# The rooms that their own unit tests cover; the whole suite under coverage takes 20 minutes.
ROOMS := config coordination data distillation models runs services
cover-units: $(VENV)/.installed-dev  ## Check that unit tests cover their rooms
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -n 2 --dist worksteal $(ROOMS:%=tests/%) $(AGAIN)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=90 --include='$(subst $() $(),$(comma),$(ROOMS:%=*/%/*))'

matrix: $(VENV)/.installed-dev  ## Run the unit tests with every Python and the oldest and newest dependencies
	$(BIN)/python -m tests.matrix

bench: $(VENV)/.installed-dev  ## Measure against the plain loop and on simulated devices (50 min)
	$(BIN)/python -m bench

check: $(VENV)/.installed-dev imports types proto-check docs audit cover-units  ## Check format, lint, images, imports, types, wire contract, documentation, packages and coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/hadolint deploy/Containerfile

lock: $(VENV)/.installed-dev  ## Lock the packages of the images anew, in deploy/requirements
	mkdir -p build && UV=$(BIN)/uv sh deploy/requirements/lock.sh $(LOCK)

format: $(VENV)/.installed-dev  ## Format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format -w proto

# services/ is installed as switokd.services. Tools that read files find it there in a copy.
tree:
	rm -rf build/tree && mkdir -p build/tree
	cp -R switokd tests bench pyproject.toml build/tree/ && cp -R services build/tree/switokd/services

imports: $(VENV)/.installed-dev tree  ## Check that no room imports a room above it
	cd build/tree && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache --no-logo

types: $(VENV)/.installed-dev tree  ## Check types
	cd build/tree && $(CURDIR)/$(BIN)/mypy --cache-dir=$(CURDIR)/.mypy_cache -p switokd -p tests -p bench

# The generator has an environment of its own: the oldest supported protobuf must generate the code,
# the newest one must run the tests.
PROTOC := build/proto-tools

$(PROTOC)/.installed: proto/requirements.txt
	$(PYTHON) -m venv $(PROTOC)
	$(PROTOC)/bin/pip install --quiet --requirement proto/requirements.txt
	touch $@

define GENERATE
	$(PROTOC)/bin/python -m grpc_tools.protoc --proto_path=proto \
	  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) \
	  --plugin=protoc-gen-mypy=$(PROTOC)/bin/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(PROTOC)/bin/protoc-gen-mypy_grpc switokd/v1/coordinator.proto
endef

proto: $(PROTOC)/.installed  ## Generate switokd/v1 from proto/
	$(call GENERATE,.)

proto-check: $(VENV)/.installed-dev $(PROTOC)/.installed  ## Check proto/ and the code generated from it
	$(BIN)/buf lint proto
	$(BIN)/buf format -d --exit-code proto
	$(BIN)/buf breaking proto --against proto/baseline.json
	rm -rf build/proto && mkdir -p build/proto
	$(call GENERATE,build/proto)
	diff -r -x __init__.py -x __pycache__ build/proto/switokd/v1 switokd/v1 \
	  || { echo 'switokd/v1 is not what proto/ generates: run make proto'; exit 1; }

proto-baseline: $(VENV)/.installed-dev  ## Accept the contract as it stands as the one not to break
	$(BIN)/buf build proto -o proto/baseline.json

# Into build/site. Without --strict a dead link would be a warning only.
docs: $(VENV)/.installed-dev  ## Build the documentation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

k8s: $(VENV)/.installed  ## Write the manifests in k8s anew from their run files
	PATH="$(CURDIR)/$(BIN):$$PATH" sh k8s/render.sh k8s

audit: $(VENV)/.installed-dev  ## Look for known vulnerabilities in the locked packages
	$(BIN)/python -m tests.audit

clean:  ## Remove what was built (not .venv, not runs/)
	rm -rf build .mypy_cache .pytest_cache .ruff_cache .coverage* switokd.egg-info
