"""What some tests need of the machine, as marks that skip them with a reason where it is missing."""

import shutil

import pytest

# torch.compile on a CPU writes C++ and compiles it; nothing else here needs a compiler.
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)
