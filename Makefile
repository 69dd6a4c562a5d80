# make demo | serve-demo | test | build | docs: each does everything it needs on a fresh clone, set-up included.
BUILD   ?= build
PYTHON  := .venv/bin/python
# For a build directory's first time. A whole build is shorter with several files of a room at once.
CONFIGURE = PATH="$(CURDIR)/.venv/bin:$$PATH" cmake --preset release -B $(BUILD) -DTORPOR_UNITY=ON

.PHONY: all setup build model models sdks test wheel packages docs demo serve-demo dashboard
.PHONY: soak load clients fleet ray libcxx test-neon fuzz goldens prove clean
all: build

setup: .venv/.ready
.venv/.ready: requirements.txt scripts/bootstrap
	scripts/bootstrap

build: setup
	@grep -qs TORPOR_REMOTE:BOOL=ON $(BUILD)/CMakeCache.txt || \
	  $(CONFIGURE) -DTORPOR_SERVER=ON -DTORPOR_REMOTE=ON
	cmake --build $(BUILD)

model: setup
	scripts/fetch-model smollm2-135m

models: model
	scripts/fetch-model smollm2-135m.gguf qwen2.5-coder-0.5b qwen2.5-coder-0.5b.gguf gemma3-270m gemma3-270m.gguf \
	  families vocabularies

# What tests run beside Torpor: the vendors' clients, a server for S3, mkdocs.
sdks: setup
	scripts/fetch-sdks js python gofakes3 docs

# TEST_FLAGS=--times ends with each stage's seconds and the ten slowest tests.
# Downloads wait for the network, and so are made beside the compiler.
test: setup
	$(MAKE) --no-print-directory -j3 build models sdks
	scripts/run-tests $(TEST_FLAGS) $(BUILD)

# The wheels by pip, tested in an environment of its own; `make test` installs the same files from the build tree.
wheel: build model
	scripts/check-wheel

# Wheels that other machines take, a tarball and a Debian package of the command line, in build/packages, each tested.
packages: build model
	scripts/make-packages $(BUILD)

# The documentation as a site, build/site/index.html: what the program says of itself is written anew first, into
# docs/commands.md, routes.md, names.md and headers.md. `.sdks/docs/bin/zensical build --strict` builds it from the same
# mkdocs.yml, with another look.
docs: build model
	scripts/fetch-sdks docs
	.venv/bin/python scripts/make_reference.py $(BUILD)/torpor
	.sdks/docs/bin/mkdocs build --strict --quiet --site-dir $(BUILD)/site

# The demo needs no server, so a fresh clone builds none for it; `make build` adds it.
demo: setup model
	@[ -f $(BUILD)/build.ninja ] || \
	  $(CONFIGURE) -DTORPOR_SERVER=OFF
	cmake --build $(BUILD) --target torpor_cli
	scripts/demo $(BUILD)/torpor

# A page in the browser, and an answer over curl: the server on a small real model, with a store and a key of its own. The
# second command is the one it prints.
PORT ?= 8080
serve-demo: setup model
	@grep -qs TORPOR_SERVER:BOOL=ON $(BUILD)/CMakeCache.txt || \
	  $(CONFIGURE) -DTORPOR_SERVER=ON -DTORPOR_REMOTE=OFF
	cmake --build $(BUILD) --target torpor_cli
	exec $(BUILD)/torpor serve --model .models/smollm2-135m --port $(PORT) --store $(BUILD)/serve-demo/store \
	  --api-key-file $(BUILD)/serve-demo/api-keys --log $(BUILD)/serve-demo/log

# The dashboard in the system's Chromium: every view and action, axe-core without a complaint, and the screenshots of the docs.
dashboard: build model
	scripts/check-dashboard $(BUILD)/torpor

# Ten agents, three processes on one store, each killed over and over: `make test` kills 300, this KILLS. Then 64 savers
# beside a gc loop and a disk limit, with 10,000 segments; then conversations (`torpor chat`) and commands.
# At last SEEDS stories of workers that share a simulated bucket.
KILLS ?= 20000
SEEDS ?= 100000
soak: build model
	TORPOR_SOAK_KILLS=$(KILLS) $(BUILD)/tests/test_store_soak
	TORPOR_SOAK=1 $(BUILD)/tests/test_store_many_savers
	TORPOR_STRESS_OPERATIONS=20000 $(BUILD)/tests/test_stress
	TORPOR_SEEDS=$(SEEDS) $(BUILD)/tests/test_remote_simulation
	TORPOR_KILLS=$$(($(KILLS) / 50)) TORPOR_BIN=$(BUILD)/torpor .venv/bin/python -m pytest -q tests/test_kill.py

# The server under load for LOAD_SECONDS: 1,000 connections, 200 streams that hardly move, 20 turns at once. Then
# LOAD_KILLS times kill -9, and a client that is cut ten times in a prompt of 4,000 tokens. Prints /health's p99, and
# memory. Then 10,000 bodies that no client means, and as many heads.
LOAD_SECONDS ?= 600
LOAD_KILLS ?= 100
load: build model
	TORPOR_LOAD=1 TORPOR_LOAD_SECONDS=$(LOAD_SECONDS) TORPOR_LOAD_KILLS=$(LOAD_KILLS) TORPOR_MUTATIONS=10000 \
	  TORPOR_BIN=$(BUILD)/torpor .venv/bin/python -m pytest -q -s tests/test_serve_load.py tests/test_serve_mutations.py \
	  tests/test_serve_sockets.py

# Coding agents, and the examples with frameworks for agents, on a model whose answers are scripted.
clients: build model
	scripts/fetch-sdks python clients
	TORPOR_CLIENTS=1 TORPOR_BIN=$(BUILD)/torpor .venv/bin/python -m pytest -q -rs tests/test_clients.py

# Stores of objects: all checks on gofakes3 and versitygw, and 64 writers at a time for 1,000 rounds. Then deploy/: its
# files against their schemas, and servers behind HAProxy (if it is installed) and Envoy. At last 1,000 agents on four
# servers behind HAProxy over versitygw, under faults from a seed, in network namespaces. That needs root and HAProxy;
# CHAOS="--network loopback" needs neither. tests/chaos.py has the options that CHAOS may change.
CHAOS ?= --seed 1
fleet: build model
	scripts/fetch-sdks gofakes3 versitygw toxiproxy deploy
	TORPOR_FLEET=1 TORPOR_BIN=$(BUILD)/torpor .venv/bin/python -m pytest -q -rs tests/test_remote.py tests/test_deploy.py \
	  tests/test_fleet.py
	TORPOR_BIN=$(BUILD)/torpor .venv/bin/python tests/chaos.py --network namespaces $(CHAOS)

# torpor.ray on a Ray of its own, of three nodes with a bucket: replicas and a node are killed, 100 agents have turns
# meanwhile. Not in CI.
ray: build model
	scripts/fetch-sdks ray
	TORPOR_RAY=1 TORPOR_BIN=$(BUILD)/torpor .venv/bin/python -m pytest -q tests/test_ray.py

# Each fuzz target for FUZZ_S seconds; needs clang++.
FUZZ_S ?= 60
fuzz: setup
	scripts/fuzz $(FUZZ_S)

# All sources with clang 16 and libc++, which is the nearest to a Mac's compiler (ten minutes of one core).
libcxx: build
	scripts/check-libcxx --build $(BUILD)

# The tests of base, store, text and kernels on arm64, which is emulated: needs Debian's cross compiler and qemu-user.
test-neon: models
	scripts/test-neon

# Regenerates every golden from the reference implementations (mlx-lm, tokenizers, transformers). Slow.
goldens: setup models
	scripts/make-goldens

# The tests of tests/proofs.txt fail at REV and pass here.
REV ?= 2543f30
prove: build model
	scripts/prove-tests $(REV) --here $(BUILD)

clean:
	rm -rf build build-*
