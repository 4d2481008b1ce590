"""One float checkpoint and its INT8 version, made once."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from model.quantization.quantize import Techniques, quantize_tensors, read_float_checkpoint, write_checkpoint
from model.quantization.samples import self_generated


@pytest.fixture(scope="session")
def tensors(base_config, checkpoint_of):
    """Float tensors of the base model."""
    return read_float_checkpoint(checkpoint_of(base_config))[1]


@pytest.fixture(scope="session")
def sequences(base_config, tensors):
    """Twelve sequences that the model wrote."""
    return self_generated(base_config, tensors, num=12, length=48, seed=1)


@pytest.fixture(scope="session")
def int8_checkpoint(base_config, checkpoint_of, tensors, sequences, tmp_path_factory):
    """Directory of the base model in INT8, every technique on."""
    directory = tmp_path_factory.mktemp("int8")
    model = quantize_tensors(base_config, tensors, sequences[:8], Techniques())
    write_checkpoint(checkpoint_of(base_config), directory, model)
    return directory


@pytest.fixture
def broken(int8_checkpoint, tmp_path):
    """A function: a copy of the INT8 checkpoint whose tensors a test has changed."""

    def make(change):
        shutil.copytree(int8_checkpoint, tmp_path, dirs_exist_ok=True)
        stored = load_file(tmp_path / "model.safetensors")
        change(stored)
        save_file(stored, tmp_path / "model.safetensors")
        return tmp_path

    return make
