"""What is said of devices that were asked for and are not there, and of a run that fell back to the CPU."""

import logging

import jax
import pytest

from hybrid_jax.core.errors import UserError
from hybrid_jax.parallel import devices
from hybrid_jax.parallel.devices import check_devices, check_platforms


@pytest.fixture
def installed(monkeypatch):
    """The modules that count as installed, and the device files that are there."""
    modules, files = set(), []
    monkeypatch.setattr(devices, "_is_installed", modules.__contains__)
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: [f for f in files if f.startswith("/dev/nvidia")])
    monkeypatch.setattr(devices, "has_tpu_device", lambda: "tpu" in files)
    return modules, files


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("cuda", r"=cuda needs JAX with CUDA, which is not installed: pip install -e '\.\[cuda\]'"),
        ("gpu", r"JAX_PLATFORMS=gpu needs JAX with CUDA"),
        ("tpu", r"=tpu needs JAX with libtpu, which is not installed: pip install -e '\.\[tpu\]'"),
        ("tpu,cpu", r"JAX_PLATFORMS=tpu,cpu needs JAX with libtpu"),
        ("cdua", r"unknown platform 'cdua'; did you mean 'cuda'\? known: cpu, cuda, gpu, rocm, tpu"),
        ("CPU", r"unknown platform 'CPU'; did you mean 'cpu'\?"),
        ("cpu, cuda", r"unknown platform ' cuda'; did you mean 'cuda'\?"),
    ],
)
def test_a_platform_that_cannot_be_had_is_one_line_with_the_extra_or_the_nearest_name(
    installed, asked, message
):
    with pytest.raises(UserError, match=message):
        check_platforms(asked.split(","))


@pytest.mark.parametrize("asked", ["", "cpu", "cuda,cpu"])
def test_platforms_that_can_be_had_pass(installed, asked):
    check_platforms([name for name in asked.split(",") if name])


@pytest.mark.parametrize(
    ("modules", "files", "reason"),
    [
        ([], ["/dev/nvidia0"], "there is an NVIDIA GPU (/dev/nvidia0), but JAX has no CUDA: pip install -e"),
        (["jax_cuda13_plugin"], [], "JAX with CUDA is installed but finds no GPU; see nvidia-smi"),
        (["jax_cuda12_plugin"], ["/dev/nvidia0"], "JAX with CUDA is installed but cannot use the GPU (/dev/n"),
        ([], ["tpu"], "there is a TPU, but JAX has no libtpu: pip install -e '.[tpu]'"),
        (["libtpu"], [], "libtpu is installed but finds no TPU"),
    ],
)
def test_a_run_that_falls_back_to_the_cpu_says_so_and_why(installed, caplog, modules, files, reason):
    installed[0].update(modules)
    installed[1].extend(files)
    with caplog.at_level(logging.WARNING):
        check_devices(environment={})
    (message,) = caplog.messages
    assert message.startswith(f"running on the CPU: {reason}")
    assert message.endswith("(JAX_PLATFORMS=cpu says that this is meant)")


def test_a_run_that_is_meant_for_the_cpu_or_has_nothing_else_says_nothing(installed, caplog):
    with caplog.at_level(logging.WARNING):
        check_devices(environment={})
        installed[1].append("/dev/nvidia0")
        check_devices(environment={"JAX_PLATFORMS": "cpu"})
        check_devices(environment={}, expect_accelerator=False)
    assert caplog.messages == []


def test_a_device_that_another_process_holds_is_one_line_also_where_no_platform_was_asked_for(monkeypatch):
    def busy():
        raise RuntimeError("Unable to initialize backend 'tpu':\nThe TPU is already in use by process 7")

    monkeypatch.setattr(jax, "default_backend", busy)
    with pytest.raises(
        UserError, match=r"^no device can be used: Unable .* 'tpu': The TPU is already in use by process 7$"
    ):
        check_devices(environment={})
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=cpu: Unable to "):
        check_devices(environment={"JAX_PLATFORMS": "cpu"})
