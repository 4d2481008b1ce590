"""Parts that the device tests share."""

from pathlib import Path

import pytest
import yaml

from devices.spec import SupernodeSpec
from devices.topology import Topology
from model.config import ModelConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def hardware_file() -> str:
    """Text of the shipped hardware description."""
    return (CONFIGS / "hardware" / "cloudmatrix384.yaml").read_text()


@pytest.fixture(scope="session")
def supernode(hardware_file: str) -> SupernodeSpec:
    """The machine of the paper."""
    return SupernodeSpec.from_dict(yaml.safe_load(hardware_file))


@pytest.fixture(scope="session")
def h800() -> SupernodeSpec:
    """The GPU cluster that the paper compares with."""
    return SupernodeSpec.from_dict(yaml.safe_load((CONFIGS / "hardware" / "h800.yaml").read_text()))


@pytest.fixture(scope="session", params=["cloudmatrix384", "h800"])
def machine(request: pytest.FixtureRequest) -> SupernodeSpec:
    """Each of the two kinds of machine, for what holds on any."""
    return SupernodeSpec.from_dict(yaml.safe_load((CONFIGS / "hardware" / f"{request.param}.yaml").read_text()))


@pytest.fixture(scope="session")
def topology(supernode: SupernodeSpec) -> Topology:
    """Its links."""
    return Topology(supernode)


@pytest.fixture(scope="session")
def deepseek_r1() -> ModelConfig:
    """The shape of the full model."""
    return ModelConfig.from_dict(yaml.safe_load((CONFIGS / "model" / "deepseek-r1.yaml").read_text()))
