PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLASSIFICATION := $(VENV)/.classification
DEMO := strip-mlp-tiny-light_1xb64_digits-32px
DEMO_DIR := work_dirs/$(DEMO)
STRIP := Strip-MLP-T=mmstrip.StripMLP:arch=tiny
SWIN := Swin-T=mmpretrain.SwinTransformer:arch=tiny
CONVNEXT := ConvNeXt-T=mmpretrain.ConvNeXt:arch=tiny
RESNET := ResNet-50=mmpretrain.ResNet:depth=50
CLASSIFIER := strip-mlp-tiny-light_1xb32_caltech101-64px
CLASSIFIER_DIR := work_dirs/$(CLASSIFIER)
CLASSIFIER_RECORD := $(CLASSIFIER_DIR)/record
DIGITS := strip-mlp-pico_1xb64_digits-64px
PEERS := $(SWIN) $(CONVNEXT) $(CONVNEXT)@channels_last $(RESNET) $(RESNET)@channels_last
BFLOAT16 := $(addsuffix @autocast,$(SWIN) $(CONVNEXT)@channels_last $(RESNET)@channels_last $(STRIP) $(STRIP)@deploy)
# All forms of a trained network on a CPU.
COMPILED := @compile@freezing @compile@autocast@freezing
RUNTIMES := @openvino @openvino@bfloat16 @onnxruntime
FORMS := $(PEERS) $(STRIP) $(STRIP)@deploy $(BFLOAT16) \
	$(addsuffix @bfloat16,$(CONVNEXT)@channels_last $(RESNET)@channels_last $(STRIP)@deploy) \
	$(foreach model,$(SWIN) $(CONVNEXT) $(RESNET)@channels_last $(STRIP)@deploy,$(addprefix $(model),$(COMPILED))) \
	$(foreach model,$(SWIN) $(CONVNEXT) $(RESNET) $(STRIP)@deploy,$(addprefix $(model),$(RUNTIMES)))
# All formats and precisions of exported networks, bfloat16 if the CPU supports it; Swin and ResNet are not compressed.
BF16 := $(shell grep -q avx512_bf16 /proc/cpuinfo && echo @openvino@bfloat16)
STORED := @onnxruntime @onnxruntime@half @onnxruntime@int8 @openvino $(BF16) @openvino@half @openvino@int8
FILES := $(STRIP)@deploy $(foreach model,$(STRIP)@deploy $(CONVNEXT),$(addprefix $(model),$(STORED))) \
	$(foreach model,$(SWIN) $(RESNET),$(addprefix $(model),@onnxruntime @openvino $(BF16)))

# All of these work from nothing; see README.md.
.PHONY: install demo weights classifier transfer evidence ablations speed benchmark benchmark-forms benchmark-files benchmark-loader files gpu count soak test sanitize lint docs clean

install: $(INSTALLED)
	@echo "[install] ready in $(VENV)"

# Rerun when their inputs change; tools/install.py skips the steps that are done.
SOURCES := tools/install.py setup.py pyproject.toml $(wildcard requirements/*.txt mmstrip/ops/extension.py mmstrip/ops/csrc/*)
$(INSTALLED) $(CLASSIFICATION): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "mmstrip needs Python 3.10 or newer: make install PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "[install] creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@$(BIN)/python tools/install.py $(if $(filter $(CLASSIFICATION),$@),classification)
	@touch $(CLASSIFICATION) $@

# The demo installs only what classifiers need; the other targets add the rest.
demo: $(CLASSIFICATION)
	$(BIN)/python tools/train.py configs/strip_mlp/$(DEMO).py --work-dir $(DEMO_DIR) --amp auto
	$(BIN)/python tools/test.py configs/strip_mlp/$(DEMO).py "$$(cat $(DEMO_DIR)/last_checkpoint)" \
		--work-dir $(DEMO_DIR)/test --out $(DEMO_DIR)/test/predictions.pkl --show-dir $(DEMO_DIR)/test/pictures --interval 20

# The weights in demo/, of the page and the tutorial: some minutes on two cores.
weights: install
	$(BIN)/python tools/train.py configs/strip_mlp/$(DIGITS).py --work-dir work_dirs/$(DIGITS) --amp auto
	$(BIN)/python tools/model_converters/publish_model.py configs/strip_mlp/$(DIGITS).py \
		"$$(cat work_dirs/$(DIGITS)/last_checkpoint)" demo/$(DIGITS).safetensors --half
	$(BIN)/python tools/test.py configs/strip_mlp/$(DIGITS).py demo/$(DIGITS).safetensors --work-dir work_dirs/$(DIGITS)/test

# The classifier of Caltech-101 that transfer learning starts from; the same command resumes. It keeps its logs, curves
# and the checksum of its config in CLASSIFIER_RECORD. OPTIONS are those of tools/train.py.
CALTECH101 := tools/dataset_converters/caltech101.py data/caltech101 --smaller-copy data/caltech101_96px
classifier: install
	test -f data/caltech101_96px/meta/test.txt || $(BIN)/python $(CALTECH101)
	$(BIN)/python tools/train.py configs/strip_mlp/$(CLASSIFIER).py --work-dir $(CLASSIFIER_DIR) --resume $(OPTIONS)
	$(BIN)/python tools/test.py configs/strip_mlp/$(CLASSIFIER).py "$$(cat $(CLASSIFIER_DIR)/last_checkpoint)" \
		--work-dir $(CLASSIFIER_DIR)/test
	mkdir -p $(CLASSIFIER_RECORD)
	grep -hE 'Epoch\(|resumed epoch|native operators' $(CLASSIFIER_DIR)/2*/2*.log $(CLASSIFIER_DIR)/test/2*/2*.log \
		>$(CLASSIFIER_RECORD)/log.txt
	cp $$(ls -t $(CLASSIFIER_DIR)/2*/curves.png | head -n 1) $(CLASSIFIER_RECORD)
	sha256sum $(CLASSIFIER_DIR)/$(CLASSIFIER).py >$(CLASSIFIER_RECORD)/config.sha256

transfer: install
	$(BIN)/python -m benchmarks.transfer

# The trainings of docs/results.md take hours and need its datasets. An interrupted run resumes.
evidence: install
	$(BIN)/python -m benchmarks.evidence --jobs 2

# Training steps of the compared models in turn, for the minutes in docs/results.md. Run it on a quiet machine.
COMPARED_AT := _1xb32_caltech101-64px.py
COMPARED := strip-mlp-tiny-light=configs/strip_mlp/strip-mlp-tiny-light$(COMPARED_AT) \
	$(foreach model,resnet18 resnet50 swin-tiny,$(model)=configs/comparison/$(model)$(COMPARED_AT)) \
	convnext-tiny=configs/comparison/convnext-tiny$(COMPARED_AT)@channels_last
speed: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed $(COMPARED) \
		--modes train --batch 32 --shapes 64 --rounds 20 --out docs/results/speed

ablations: install
	$(BIN)/python -m benchmarks.evidence --jobs 2 --parts ablations ablations-128px

benchmark: install
	$(BIN)/python -m benchmarks.speed $(PEERS) $(STRIP) $(STRIP)@deploy $(STRIP)@reference $(BFLOAT16) \
		--modes inference train --rounds 8 --out work_dirs/benchmark/224
	$(BIN)/python -m benchmarks.speed $(STRIP) $(STRIP)@deploy \
		--batch 2 --shapes 224 448 800x1216 --rounds 5 --out work_dirs/benchmark/dense

# Exporting and compiling come first and take about five minutes.
benchmark-forms: install
	$(BIN)/python -m benchmarks.speed $(FORMS) --out work_dirs/benchmark/forms

# The table of docs/deployment.md: milliseconds for one image and for eight.
benchmark-files: install
	for batch in 1 8; do \
		$(BIN)/python -m benchmarks.speed $(FILES) --batch $$batch --out work_dirs/benchmark/files-$$batch || exit 1; \
	done

# Training images that a core loads per second. IMAGES=FOLDER measures your own photographs.
benchmark-loader: install
	$(BIN)/python -m benchmarks.speed.loader $(IMAGES) --out work_dirs/benchmark/loader.json

# Accuracy and size: make files CONFIG=... CHECKPOINT=... exports a classifier in all formats and tests each file.
FILES_DIR := work_dirs/files
files: install
	mkdir -p $(FILES_DIR)
	for kind in onnx:onnx openvino:xml; do \
		format=$${kind%:*}; end=$${kind#*:}; \
		$(BIN)/python tools/deployment/export.py $(CONFIG) $(CHECKPOINT) $(FILES_DIR)/float32.$$end --format $$format --dynamic-batch && \
		$(BIN)/python tools/deployment/export.py $(CONFIG) $(CHECKPOINT) $(FILES_DIR)/half.$$end --format $$format --dynamic-batch --half && \
		$(BIN)/python tools/deployment/quantize.py $(FILES_DIR)/float32.$$end $(CONFIG) $(FILES_DIR)/int8.$$end || exit 1; \
	done
	for file in $(FILES_DIR)/*.onnx $(FILES_DIR)/*.xml; do \
		$(BIN)/python tools/test.py $(CONFIG) $$file --work-dir $$file.test || exit 1; \
	done
	$(if $(BF16),$(BIN)/python tools/test.py $(CONFIG) $(FILES_DIR)/float32.xml --amp bfloat16 --work-dir $(FILES_DIR)/bfloat16.xml.test)
	tail -n +1 $(FILES_DIR)/*.test/*/2*.json && ls -l $(FILES_DIR)

# For a machine with a GPU. Finished steps are skipped.
gpu: install
	$(BIN)/python -m benchmarks.gpu

# Counts what an iteration would launch on a GPU; needs none, takes about ten minutes.
count: install
	$(BIN)/python -m benchmarks.gpu.count

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

# Processes of one core each, one more than there are, as some wait for others that they start. Files stay together, as
# their tests share trained models, in the order of tests/conftest.py.
PROCESSES = $(shell $(BIN)/python -c 'import os; print(min(os.cpu_count() + 1, 4))')
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder \
		--max-worker-restart 0

# The operators' tests on a build of the library that checks every memory access; it is removed afterwards.
SANITIZED := MMSTRIP_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
sanitize: install
	$(SANITIZED) $(BIN)/python setup.py build_ext --inplace --build-temp build/sanitize --build-lib build/sanitize
	$(SANITIZED) LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -s -p no:xdist tests/test_ops/test_operators.py tests/test_ops/test_bfloat16.py; \
		status=$$?; rm -rf build/sanitize mmstrip/ops/_C_sanitized_*; exit $$status

# Into build/html.
docs: install
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -c docs . build/html

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) work_dirs build *.egg-info mmstrip/ops/*.so
