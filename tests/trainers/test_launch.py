"""`accelerate launch` with the files in trainers/configs: two processes do what one does with twice the batches."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_dmc import arguments, small  # noqa: F401
from test_train_retaining_heads import arguments as for_heads

import hf_kvcache as kv
from hf_kvcache.trainers import train_dmc, train_retaining_heads

# a launcher and two interpreters each
pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "trainers" / "configs"
ON_DEVICES = str(Path(__file__).with_name("on_devices.py"))


def launch(config, *command):
    """Run a command in two processes; returns what it printed."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    settings = ["--config_file", str(CONFIGS / config), "--num_processes", "2"]
    return subprocess.run([*launcher, *settings, *command], capture_output=True, text=True)


def assert_same_weights(one, two):
    one, two = load_file(one), load_file(two)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert torch.allclose(two[name], expected, atol=1e-6), name


@pytest.mark.parametrize("decision", ["borrowed", "rows"])
def test_retrofits_under_fsdp(small, tmp_path, decision):  # noqa: F811
    more = ("--decision", decision, "--offset", "0.5", "--clip-norm", "0")
    done = launch("fsdp.yaml", ON_DEVICES, "train_dmc", *arguments(small, tmp_path / "two", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.enable_grad():
        train_dmc.main(arguments(small, tmp_path / "one", *more, "--accumulation", "2"))
    assert_same_weights(tmp_path / "one/model.safetensors", tmp_path / "two/model.safetensors")


def test_heads_under_ddp(tmp_path):
    done = launch(
        "ddp.yaml",
        "-m",
        "hf_kvcache.trainers.train_retaining_heads",
        *for_heads(kv.embedded_model(), tmp_path / "two", 2),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.enable_grad():
        train_retaining_heads.main(for_heads(kv.embedded_model(), tmp_path / "one", 2, "--accumulation", "2"))
    assert_same_weights(tmp_path / "one/adapter_model.safetensors", tmp_path / "two/adapter_model.safetensors")


def test_what_fsdp_cannot_do_is_refused(small, tmp_path):  # noqa: F811
    done = launch("fsdp.yaml", ON_DEVICES, "train_retaining_heads", *for_heads(kv.embedded_model(), tmp_path, 2))
    assert done.returncode and "launch it with trainers/configs/ddp.yaml" in done.stderr
    version = ["--fsdp_version", "1", "--fsdp_sync_module_states", "false"]
    done = launch("fsdp.yaml", *version, ON_DEVICES, "train_dmc", *arguments(small, tmp_path))
    assert done.returncode and "retrofits are trained under FSDP 2" in done.stderr
