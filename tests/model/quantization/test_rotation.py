"""Orthogonal transforms absorbed in the weights: the same model in another basis."""

import dataclasses

import pytest
import torch

from model.checkpoint import random_tensors
from model.quantization.calibration import PlainModel
from model.quantization.rotation import random_orthogonal, rotate
from model.tensor_files import TensorDict

TOKENS = list(range(20, 60))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 24, 192, 256])
def test_the_transform_is_orthogonal_and_spreads_one_channel_over_all(size):
    matrix = random_orthogonal(size, 5)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.equal(matrix, random_orthogonal(size, 6)) or size == 1
    if size & (size - 1) == 0:  # a Hadamard matrix: all entries of one size
        assert matrix.abs().max().item() == pytest.approx(size**-0.5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "tie_word_embeddings": True},
        {"num_nextn_predict_layers": 2, "n_shared_experts": 2, "hidden_size": 48},
        {"num_nextn_predict_layers": 0, "first_k_dense_replace": 3},
    ],
    ids=str,
)
def test_the_rotated_float_model_is_the_model(changes, base_config):
    config = dataclasses.replace(base_config, **changes)
    tensors = {name: torch.from_numpy(values) for name, values in random_tensors(config, 0).items()}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    rotated_config, rotated = rotate(config, tensors, seed=7)
    assert all(torch.equal(tensors[name], copies[name]) for name in copies)
    with_mtp = config.num_nextn_predict_layers > 0
    model = PlainModel(config, TensorDict(tensors), max_len=64, with_mtp=with_mtp)
    same = PlainModel(rotated_config, TensorDict(rotated), max_len=64, with_mtp=with_mtp)
    pairs = [(model.logits(TOKENS), same.logits(TOKENS))]
    pairs += list(zip(model.mtp_logits(TOKENS), same.mtp_logits(TOKENS), strict=True))
    assert len(pairs) == 1 + config.num_nextn_predict_layers
    for wanted, found in pairs:
        assert (wanted - found).norm() / wanted.norm() < 1e-5


def test_gains_move_and_an_outlier_channel_is_spread(base_config):
    tensors = {name: torch.from_numpy(values) for name, values in random_tensors(base_config, 0).items()}
    tensors["model.embed_tokens.weight"][:, 3] *= 100
    _, rotated = rotate(base_config, tensors, seed=0)
    for name in ("model.layers.0.input_layernorm", "model.layers.3.hnorm", "model.norm"):
        assert rotated[f"{name}.weight"].unique().tolist() == [1.0]

    def peak(table):  # of a token's channels, over their root mean square
        return (table.abs().amax(1) / table.pow(2).mean(1).sqrt()).median().item()

    assert peak(tensors["model.embed_tokens.weight"]) > 7
    assert peak(rotated["model.embed_tokens.weight"]) < 2
