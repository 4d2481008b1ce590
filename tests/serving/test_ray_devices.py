"""What is refused about a checkpoint before a device starts."""

import json
import shutil
from types import SimpleNamespace

import pytest

from model.tokenizer import Tokenizer
from serving.errors import ConfigError
from serving.ray_devices import checkpoint_directory


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of the small checkpoint whose files a test may change."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def check(config):
    return checkpoint_directory(config, SimpleNamespace(folder=None))


def fewer_tokens(directory, num):
    """Give a checkpoint of 272 ids a tokenizer of fewer."""
    Tokenizer.byte_level(num).save(directory / "tokenizer.json")


@pytest.mark.parametrize("num_tokens", [272, 269])
def test_a_vocabulary_may_be_padded_by_one_percent(num_tokens, make_config, copied):
    fewer_tokens(copied, num_tokens)
    assert check(make_config("colocated", f"model.checkpoint={copied}")) == copied


@pytest.mark.parametrize(
    ("num_tokens", "words"), [(268, ", of which 3 may be padding"), (273, "config.json is 272")], ids=["few", "many"]
)
def test_a_tokenizer_of_another_vocabulary_is_refused(num_tokens, words, make_config, copied):
    fewer_tokens(copied, num_tokens)
    with pytest.raises(ConfigError) as error:
        check(make_config("colocated", f"model.checkpoint={copied}", "model.config=null"))
    assert f"{copied}/tokenizer.json has {num_tokens} tokens, vocab_size of {copied}/config.json is 272" in str(
        error.value
    )
    assert str(error.value).endswith(words)


def test_the_mtp_modules_tensors_are_needed_for_drafts_alone(make_config, copied):
    from safetensors.numpy import load_file, save_file

    file = copied / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if not name.startswith("model.layers.3.")}
    save_file(tensors, file)
    assert json.loads((copied / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert check(make_config("colocated", f"model.checkpoint={copied}")) == copied
    with pytest.raises(ConfigError, match=r"model.checkpoint: model.layers.3.\S+: missing from"):
        check(make_config("colocated", f"model.checkpoint={copied}", "speculative.num_speculative_tokens=1"))
