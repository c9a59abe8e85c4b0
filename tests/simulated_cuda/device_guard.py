"""Build of the library that makes the CPU build of torch accept CUDA tensors without storage."""

import os
import shutil
import subprocess
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("pretend_cuda.cpp")


def compiler() -> str | None:
    """Return the system's C++ compiler, or None: that of `CXX`, or c++, g++ or clang++."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compile the library, which a process preloads, and return its path."""
    root, library = Path(torch.__file__).parent, folder / "pretend_cuda.so"
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-I", str(root / "include")]
    linked = ["-L", str(root / "lib"), "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    command = [compiler(), *flags, str(_SOURCE), "-o", str(library), *linked]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return library
