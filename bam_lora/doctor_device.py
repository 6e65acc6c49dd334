"""torch, GPU, 4-bit weights and attention, for `bam-lora doctor`: each is used, not only looked at."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bam_lora.doctor_finding import NOTE, OK, PROBLEM, Finding, gigabytes
from bam_lora.errors import first_line

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_AMD_DRIVER = Path("/sys/module/amdgpu/initstate")
_AMPERE = 8
_NF4_ERROR = (0.05, 0.15)  # relative, of normally distributed numbers: 0.09 (QLoRA's blocks of 64)
_NORM_ERROR = 1e-3  # relative, in fp32
_LITTLE_FREE = 0.8
_INSTALL = "Install the build for your GPU: https://pytorch.org/get-started/locally"


def torch_build() -> Iterator[Finding]:
    """What torch was built for, and whether it reaches what the machine has."""
    import torch

    version = f"torch {torch.__version__}"
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else kind
    if torch.cuda.is_available():
        yield Finding("torch", OK, f"{version}, built for {kind}; the driver works with it")
    elif not kind:
        yield _cpu_build(version)
    elif _driver():
        yield Finding(
            "torch",
            PROBLEM,
            f"{version}, built for {kind}, cannot use the GPU: {_reason()}",
            f"Update the driver ({_driver()}), or install a torch built for an older {kind.split()[0]}",
        )
    else:
        yield Finding(
            "torch",
            NOTE,
            f"{version}, built for {kind}, finds no GPU driver: runs go on the CPU",
            "Install the GPU's driver, if there is a GPU; in a container pass the GPU on (--gpus all)",
        )


def _cpu_build(version: str) -> Finding:
    import torch

    if torch.backends.mps.is_available():
        return Finding("torch", OK, f"{version}, with Apple's Metal (MPS)")
    if _driver():
        return Finding("torch", PROBLEM, f"{version} is built for CPUs, but there is a GPU ({_driver()})", _INSTALL)
    return Finding(
        "torch",
        NOTE,
        f"{version}, built for CPUs: enough for the quickstart and small models",
        _INSTALL + ", if there is one",
    )


def _driver() -> str:
    """The GPU driver that the system has, in words, or ""."""
    if _NVIDIA_DRIVER.exists():
        line = _NVIDIA_DRIVER.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        return " ".join(line.removeprefix("NVRM version:").split()[:6])
    return "amdgpu" if _AMD_DRIVER.exists() else ""


def _reason() -> str:
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "it reports no device"


def gpus() -> Iterator[Finding]:
    """Name, memory, compute capability and bfloat16 of each GPU that can be seen."""
    import torch

    if not torch.cuda.is_available():
        name = platform.processor() or platform.machine()
        yield Finding("gpu", NOTE, f"none to use: {os.cpu_count()} processors ({name}); small models only")
        return
    count = torch.cuda.device_count()
    for number in range(count):
        yield _gpu(number)
    if count > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        yield Finding(
            "gpu",
            NOTE,
            f"of {count} GPUs the first is used, for branches train one after the other",
            "CUDA_VISIBLE_DEVICES=1 bam-lora run ... takes another",
        )


def _gpu(number: int) -> Finding:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    major, minor = torch.cuda.get_device_capability(number)
    title = f"{number}: {torch.cuda.get_device_name(number)}, compute capability {major}.{minor}"
    memory = f"{gigabytes(free)} of {gigabytes(total)} free"
    if not torch.version.hip and not _built_for(major, minor, torch.cuda.get_arch_list()):
        remedy = "Install a torch that still has it, such as one for CUDA 12.6"
        return Finding("gpu", PROBLEM, f"{title}, for which torch {torch.__version__} has no code", remedy)
    if not torch.version.hip and major < _AMPERE:
        return Finding(
            "gpu",
            NOTE,
            f"{title}, no bfloat16 of its own, {memory}",
            "Set quantization.compute_dtype: float16 in the recipe, as `bam-lora init` does here",
        )
    if free < _LITTLE_FREE * total:
        remedy = "Close what else uses it (nvidia-smi names it), or plan with `bam-lora init --gpu-memory`"
        return Finding("gpu", NOTE, f"{title}, bfloat16, {memory}", remedy)
    return Finding("gpu", OK, f"{title}, bfloat16, {memory}")


def _built_for(major: int, minor: int, architectures: Sequence[str]) -> bool:
    """Whether a build has code for a card: of its generation and no newer, or in a form that the driver compiles."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = int("".join(character for character in digits if character.isdigit()) or 0)
        generation = divmod(number, 10)
        exact = kind == "sm" and generation[0] == major and generation[1] <= minor
        if exact or (kind == "compute" and generation <= (major, minor)):
            return True
    return False


def four_bit() -> Iterator[Finding]:
    """Quantises a small matrix to NF4 on the device that trains, and multiplies with it."""
    try:
        error, device = _try_nf4()
    except Exception as failure:  # missing kernels, wrong architecture, a library that does not load: all end here
        yield Finding(
            "4-bit",
            PROBLEM,
            f"bitsandbytes fails: {first_line(failure)}",
            "Install a bitsandbytes that fits torch and GPU; until then quantization.bits: 16",
        )
        return
    version = metadata.version("bitsandbytes")
    if _NF4_ERROR[0] < error < _NF4_ERROR[1]:
        yield Finding("4-bit", OK, f"bitsandbytes {version} quantises and multiplies in NF4 on {device}")
    else:
        yield Finding(
            "4-bit",
            PROBLEM,
            f"bitsandbytes {version} on {device}: expected products within 5 to 15 % (NF4), found {error:.0%} off",
            "Install another version of bitsandbytes; until then quantization.bits: 16",
        )


def _try_nf4() -> tuple[float, str]:
    """The relative error of a product with a matrix in NF4, and the device it was computed on."""
    import bitsandbytes
    import torch

    from bam_lora.base import device

    where = device()
    generator = torch.Generator().manual_seed(0)
    W_oi = torch.randn(128, 256, generator=generator).to(where, torch.float32)
    x_bi = torch.randn(16, 256, generator=generator).to(where, torch.float32)
    codes, state = bitsandbytes.functional.quantize_4bit(W_oi, quant_type="nf4", compress_statistics=True)
    product: Any = bitsandbytes.matmul_4bit(x_bi, codes.t(), quant_state=state)
    exact = x_bi @ W_oi.T
    return float((product - exact).norm() / exact.norm()), where


def flash_attention() -> Iterator[Finding]:
    """Whether packed rows can go document by document: through flash-attn or what torch brings along."""
    import torch

    from bam_lora.base import device

    if not device().startswith("cuda"):
        text = "packed: document by document" if device() == "cpu" else "sdpa: each row with a dense mask"
        yield Finding("attention", OK, f"{text}; flash attention is for GPUs")
        return
    from bam_lora.packed_attention import kernel_takes

    if importlib.util.find_spec("flash_attn") is None:
        if kernel_takes(torch.device("cuda"), torch.bfloat16, 128, 128):
            yield Finding("attention", OK, "packed: torch's own flash attention, document by document")
            return
        where = "; it has no wheel for this system" if sys.platform != "linux" else ""
        yield Finding(
            "attention",
            NOTE,
            f"flash-attn is not installed: sdpa is used, best with a batch size of 1 and more accumulation{where}",
            "pip install flash-attn --no-build-isolation, if you want it",
        )
        return
    try:
        flash = importlib.import_module("flash_attn")
    except (ImportError, OSError) as error:
        yield Finding(
            "attention",
            PROBLEM,
            f"flash-attn is installed but does not load: {first_line(error)}",
            "Reinstall it for this torch, or pip uninstall flash-attn",
        )
        return
    yield Finding("attention", OK, f"flash-attn {flash.__version__}")


def fused_kernels() -> Iterator[Finding]:
    """Whether a branch can be trained with fused kernels; only where there is a GPU that has them by `auto`."""
    from bam_lora.base import device
    from bam_lora.kernels import INSTALL, PACKAGE, package_lacks, surely_faster

    if device() != "cuda" or not surely_faster():
        return
    if (found := package_lacks()) is not None:
        if sys.platform != "linux":  # for others the extra installs nothing
            return
        yield Finding("kernels", NOTE, f"common models train faster with {PACKAGE}; found {found}", INSTALL)
        return
    version, remedy = metadata.version("liger-kernel"), "Reinstall it for this torch; until then training.kernels: none"
    try:
        error = norm_error()
    except Exception as failure:  # a compiler that is not there, a driver that is too old: Triton's own kinds
        yield Finding("kernels", PROBLEM, f"liger-kernel {version} fails: {first_line(failure)}", remedy)
        return
    if error > _NORM_ERROR:
        yield Finding("kernels", PROBLEM, f"liger-kernel {version}: a norm is off by {error:.1%}", remedy)
    else:
        yield Finding("kernels", OK, f"liger-kernel {version} computes a norm as torch does")


def norm_error() -> float:
    """The relative error of Liger's norm, forward and backward, on the device that trains."""
    import torch
    from liger_kernel.transformers import LigerRMSNorm

    from bam_lora.base import device

    generator = torch.Generator().manual_seed(0)
    x_bh = torch.randn(8, 256, generator=generator).to(device()).requires_grad_()
    w_bh = torch.randn(8, 256, generator=generator).to(device())
    norms = (LigerRMSNorm(256, eps=1e-6).to(device()), torch.nn.RMSNorm(256, eps=1e-6).to(device()))
    found = []
    for norm in norms:
        result = norm(x_bh)
        (gradient,) = torch.autograd.grad(result, x_bh, w_bh.clone())
        found.append(torch.cat([result.detach(), gradient]))
    return float((found[0] - found[1]).norm() / found[1].norm())
