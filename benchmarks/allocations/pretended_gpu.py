"""A GPU that is not there: torch's fake tensors on "cuda", for a torch that was built without CUDA.

Fake tensors are torch's way to run a program for its sizes alone. On a build without CUDA two things are missing: a
device guard, which pretended_gpu.cpp adds, and answers to what the libraries ask `torch.cuda`. All of this is torch's
inside, and kept in this one module.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
CAPABILITY = (8, 6)  # Ampere, as consumer cards have it: what torch's flash kernel for packed rows needs
_GIB = 1 << 30
_FOR_CUDA = re.compile(r"^cuda\b[^=\n]*=\s*'([^']*)'", re.MULTILINE)


def pretend(folder: Path) -> None:
    """Makes torch see a GPU; to be called before torch is first imported.

    Args:
        folder: Where the compiled guard is kept.

    Raises:
        SystemExit: If torch was imported before, is built for CUDA, or there is no C++ compiler.
    """
    if "torch" in sys.modules:
        sys.exit("error: the GPU has to be pretended before torch is imported")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    ctypes.CDLL(str(_built(folder)), mode=ctypes.RTLD_GLOBAL)
    import bitsandbytes.functional as functional  # which looks for CUDA's library where there is a GPU

    # Made of numbers, which fake tensors have none of.
    functional.name2qmap["dynamic"] = functional.create_dynamic_map()
    _answer()
    _let_scalars_be_read()
    _convert_modules()


def _built(folder: Path) -> Path:
    """The compiled guard, for this torch and this source."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    torch = Path(next(iter(spec.submodule_search_locations)))
    version = (torch / "version.py").read_text()
    if built_for := _FOR_CUDA.search(version):
        sys.exit(
            f"error: expected torch's build for CPUs, found one for CUDA {built_for[1]}, which has a device of its own"
        )
    name = hashlib.sha256((version + SOURCE.read_text()).encode()).hexdigest()[:16]
    library = folder / f"pretended_gpu-{name}.so"
    if library.exists():
        return library
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        sys.exit("error: expected a C++ compiler (c++ or g++), found none; install one")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    command = [compiler, "-std=c++20", "-fPIC", "-shared", *includes, str(SOURCE), "-o", str(unfinished), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {SOURCE.name} does not compile against torch in {torch}:\n{done.stderr}")
    unfinished.replace(library)
    return library


def _answer() -> None:
    """What libraries ask `torch.cuda` before they compute on a card, answered as a card of 24 GiB would."""
    import torch

    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(
        name="pretended", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=24 * _GIB, multi_processor_count=82
    )
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": False,
        "is_bf16_supported": True, "get_device_capability": CAPABILITY, "get_device_name": "pretended",
        "get_device_properties": properties, "_lazy_init": None, "_is_in_bad_fork": False, "set_device": None,
        "synchronize": None, "empty_cache": None, "manual_seed": None, "manual_seed_all": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.version.cuda = "13.0"


def _let_scalars_be_read() -> None:
    """`item()` of a fake tensor gives 1: losses and counts are logged and compared, their values change no size."""
    import torch
    from torch._subclasses import fake_impls

    def one(mode: object, function: object, tensor: Any) -> Any:
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 1

    fake_impls.op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = one


def _convert_modules() -> None:
    """`module.to()` puts new parameters in, as torch does on a card; it would swap fake ones, which it then cannot."""
    import torch

    def apply(self: Any, change: Any, recurse: bool = True) -> Any:
        for module in self.modules() if recurse else [self]:
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                with torch.no_grad():
                    changed = change(parameter)
                if changed is not parameter:
                    made = torch.nn.Parameter(changed, requires_grad=parameter.requires_grad)
                    for key, value in vars(parameter).items():  # such as how it is quantised
                        vars(made).setdefault(key, value)
                    module._parameters[name] = made
            module._buffers.update({name: change(one) for name, one in module._buffers.items() if one is not None})
        return self

    torch.nn.Module._apply = apply


def fake_tensors() -> Any:
    """The mode in which every new tensor is a fake one; numbers become tensors on the CPU first."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    FakeTensorMode.avoid_device_init = True
    torch._C._set_only_lift_cpu_tensors(True)
    return FakeTensorMode(allow_non_fake_inputs=True)


def real_tensors() -> Any:
    """A context inside `fake_tensors()` in which tensors are real."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()
