# make demo    train a small model on real images, end to end
# make scenes  after it: fine-tune it to segmentation of digits on photographs
# make boxes   after that: fine-tune it to Mask R-CNN on the same scenes
# make check   style, import layers and the fast tests, in a minute and a half: before every commit
# make test    all tests but those that need SLURM or minutes each: before every push
# make test-slow     whole runs that take a minute or more each
# make test-slurm    these, on a cluster that they start (tests/slurm)
# make lint    style, types and import layers
# make setup   only what those need: .venv with everything in it
# make peers   .venv-peers, for benchmarks.feed: what we are compared with

PYTHON ?= python3
DALI ?= cuda13          # or cuda12: the driver's major version; without a GPU either works
BIN := .venv/bin
# A rank for each GPU, up to the four lanes of the scenes; on CPUs two.
RANKS ?= $(shell $(BIN)/python -c "from pipeline import world; print(min(4, world.default_ranks()))")
# The launcher's own lines, a page at each start, are turned down; those of the ranks stay.
LAUNCH = $(BIN)/deepspeed --log_level warning --num_gpus $(RANKS)
DATA := runs/data

.PHONY: demo scenes boxes check test test-slow test-slurm lint setup peers

demo: setup $(foreach set,digits new-digits,$(DATA)/$(set)/train/manifest.json $(DATA)/$(set)/val/manifest.json)
	$(LAUNCH) launch/pretrain.py --config configs/pretrain/demo.yaml
	$(BIN)/python launch/handoff.py runs/demo --ranks $(RANKS)
	$(BIN)/python launch/evaluate.py --model models:/pvt-demo@candidate --data $(DATA)/digits/val
	$(BIN)/python launch/registry.py lineage pvt-demo

scenes: setup $(foreach split,train val,$(DATA)/scene-digits/$(split)/manifest.json)
	$(LAUNCH) launch/finetune.py --config configs/finetune/scene-digits.yaml \
		--set init.model=models:/pvt-demo@candidate
	$(LAUNCH) launch/finetune.py --config configs/finetune/scenes.yaml \
		--set init.model=models:/scene-digits@candidate
	$(BIN)/python launch/evaluate.py --model models:/scenes@candidate \
		--data $(DATA)/scenes/ade20k/annotations/validation --draw 8 --out runs/scenes.png

boxes: setup
	$(LAUNCH) launch/finetune.py --config configs/finetune/scenes-mask-rcnn.yaml \
		--set init.model=models:/scene-digits@candidate
	$(BIN)/python launch/evaluate.py --model models:/scenes-mask-rcnn@candidate \
		--data $(DATA)/scenes/coco/annotations/instances_val.json --draw 6 --out runs/boxes.png

# Files of every package whose tests take seconds.
FAST := config detr end_to_end endings evaluation_view files finetune flops goodput guard keys layers lease log \
	masks network old_versions open order paper redact revision roofline run_folder scenes scripts security \
	shards status submit

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(FAST:%=tests/test_%.py)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/slurm -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --ignore tests/slurm -m slow

test-slurm: setup
	$(BIN)/python -m pytest -n 2 tests/slurm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[$(strip $(DALI)),dev]'
	touch $@

peers: .venv-peers/ready

.venv-peers/ready: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet uv
	.venv-peers/bin/uv pip install --python .venv-peers/bin/python --compile-bytecode -r benchmarks/peers.txt
	touch $@

$(DATA)/digits/images: | setup
	$(BIN)/python launch/digits.py --out $@ --classes 0-6

$(DATA)/new-digits/images: | setup
	$(BIN)/python launch/digits.py --out $@ --classes 7-9

$(DATA)/scenes: | setup
	$(BIN)/python launch/scenes.py --out $@ --train 1500 --sides 128-192 --classes 0-2

$(DATA)/scene-digits/images: | $(DATA)/scenes
	mkdir -p $(@D)
	ln -s ../scenes/crops $@

$(DATA)/%/train/manifest.json: | $(DATA)/%/images
	$(BIN)/python launch/shards.py pack --images $(DATA)/$*/images/train --out $(@D)

$(DATA)/%/val/manifest.json: | $(DATA)/%/images $(DATA)/%/train/manifest.json
	$(BIN)/python launch/shards.py pack --images $(DATA)/$*/images/val --out $(@D) --classes-from $(DATA)/$*/train
