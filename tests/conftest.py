"""For every test: the signals of a foreground program, whoever started pytest; which modules are slow, and which ask a peer."""

import signal

import pytest

# A shell starts a job in the background with SIGINT ignored, and an ignored signal stays ignored in children: the tests
# that send Ctrl-C to a command would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

if hasattr(signal, "SIGHUP"):  # nohup ignores this one
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Folders and modules whose tests need a training, a compilation of the whole forward pass or a process each; single slow
# tests elsewhere carry the mark themselves.
SLOW = (
    "demo/test_demo_run.py",
    "demo/test_docs.py::test_readme_commands_run",
    "demo/test_corpus.py::test_reader_agrees",
    "cli/test_app.py::test_a_variable_that_torchs_openmp_cannot_read[KMP",
    "cli/test_app.py::test_a_variable_that_torchs_openmp_cannot_read[OMP_NUM_THREADS=2",
    "cli/test_documents.py",
    "cli/test_generate.py",
    "cli/test_kernel_cache.py",
    "cli/test_other_systems.py",
    "hostile/test_hostile_commands.py",
    "hostile/test_hostile_fuzz.py",
    "hostile/test_hostile_gguf.py::test_many_tiny",
    "hostile/test_hostile_gguf.py::test_truncation",
    "hostile/test_hostile_gguf.py::test_opening",
    "hostile/test_hostile_gguf_blocks.py::test_every_byte_that",
    "hostile/test_hostile_gguf.py::test_a_flipped",
    "hostile/test_hostile_torch_bin.py::test_a_compressed_record",
    "hostile/test_hostile_resources.py",
    "hostile/test_hostile_runtime.py",
    "hostile/test_hostile_training.py",
    "hostile/test_hostile_writes.py",
    "qat/test_ptq.py::test_commands",
    "qat/test_qat_processes.py",
    "qat/test_qat_train.py",
    "qat/test_qat_resume.py",
    "qat/test_qat_baselines.py",
    "qat/test_qat_plan.py",
    "qat/test_qat_data.py::test_parquet",
    "qat/test_stages.py::test_interrupted_and_resumed_is_the_whole_run_bit_for_bit",
    "qat/test_study.py",
    "tmexport/test_card.py",
    "tmexport/test_cli.py::test_both_dialects",
    "tmexport/test_hf.py",
    "tmexport/test_quantization.py",
    "runtime_ref/",
    "serve/",
    "test_zero_shot.py",
)
# Of those, what `make quick` runs all the same: one resumed run, the specification, the kernels of both presets; their compiled
# code is shared with every other test.
QUICK = (
    "qat/test_stages.py::test_interrupted_and_resumed_is_the_whole_run_bit_for_bit[stop2",
    "runtime_ref/test_reference.py",
    "runtime_ref/test_equal.py::test_kernels_equal_the_specification[exact-ternary256",
    "runtime_ref/test_equal.py::test_kernels_equal_the_specification[fast-ternary256",
    "runtime_ref/test_equal.py::test_any_number_of_threads_gives_the_same_bits",
)
PEER = (
    "onnx/",
    "runtime_ref/test_runtime_llamacpp.py",
    "runtime_ref/test_bench_peers.py",
    "tmexport/test_llamacpp.py",
    "tmexport/test_hf.py",
    "tmexport/test_mamba1.py",
    "tmexport/test_config.py::test_keys_that_do_not_matter",
    "tmexport/test_config.py::test_swish",
    "qat/test_qat_model.py::test_logits_equal_transformers",
    "qat/test_qat_model.py::test_gradients_equal_transformers",
    "tokenizer/test_against_llamacpp.py",
    "tmexport/test_doctor_loads.py",
    "tokenizer/test_features.py::test_a_token_that_llamacpp",
    "tokenizer/test_settings.py::test_a_damaged_template",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        where = item.nodeid.removeprefix("tests/")
        if where.startswith(SLOW) and not where.startswith(QUICK):
            item.add_marker(pytest.mark.slow)
        if where.startswith(PEER):
            item.add_marker(pytest.mark.peer)
