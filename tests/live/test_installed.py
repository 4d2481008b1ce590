"""The wheel, installed outside the source tree: its presets are found, and it runs from any directory."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from model.checkpoint import write_random_checkpoint
from serving.config_file import load_config
from tests.live.launches import PACKED, PATIENCE_S, settings

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that has the wheel, and borrows the dependencies of this one."""
    pytest.importorskip("hatchling", reason="the wheel's build system, which a test must not download")
    folder = tmp_path_factory.mktemp("installed")
    build = [*PIP, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run(build, check=True, timeout=PATIENCE_S)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    (packages,) = folder.glob("env/lib/python*/site-packages")
    install = [*PIP, "install", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run(install, check=True, timeout=PATIENCE_S)
    # What a .pth file in a borrowed directory says, such as where this source tree is, does not count.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "python"


def test_it_is_the_wheel_that_is_used_and_its_presets_are_found(python, tmp_path):
    command = [python, "-P", "-c", "import serving; print(serving.__file__)"]
    where = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert Path(where.strip()).is_relative_to(python.parents[1])
    check = [python, "-P", "-m", "serving.cli", "check", "laptop"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "prefill: 1 x 2 NPUs" in done.stdout
    simulate = [python, "-P", "-m", "serving.cli", "simulate", "cloudmatrix384", *settings("workload.num_requests=3")]
    done = subprocess.run(simulate, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "decode-0" in done.stdout


def test_it_runs_a_checkpoint_of_the_current_directory(launch, python, tmp_path):
    """Named by a relative path, in a directory that is not the source tree; `run` needs no port that is free."""
    write_random_checkpoint(tmp_path / "mine", load_config("laptop").shape, 9)
    overrides = (*PACKED, "model.checkpoint=mine", "workload.num_requests=3", "workload.output_len=4")
    command = (str(python), "-P", "-m", "serving.cli")
    run = launch("run", "laptop", "--json", "out.json", *settings(*overrides), command=command, cwd=str(tmp_path))
    assert run.wait() == 0, run.stderr
    values = json.loads((tmp_path / "out.json").read_text())
    assert (values["completed"], values["failed"]) == (3, 0)
    assert set(values["held_at_rest"].values()) == {0}
    assert values["simulated"]["p50_ttft_ms"] > 0
    assert "Held at Rest" in run.stdout
