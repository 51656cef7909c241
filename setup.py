"""Builds the native CPU backend; everything else about the package is in pyproject.toml."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("src/coterie/kernels/csrc")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
SOURCES: dict[str, list[str]] = {
    "threads.cpp": [],
    "memory.cpp": [],
    "profile.cpp": [],
    "library.cpp": [],
    "isa_portable.cpp": [],
}
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES |= {
        "isa_avx2.cpp": ["-mavx2", "-mfma"],
        "isa_avx512.cpp": AVX512,
        "isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    }


class BuildNative(build_ext):
    """Compiles each instruction set with its own flags into one library with a plain C interface."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # loaded by ctypes: no Python version in its name

    def build_extension(self, ext: Extension) -> None:
        objects: list[str] = []
        for name, flags in SOURCES.items():
            objects += self.compiler.compile(
                [str(CSRC / name)],
                output_dir=self.build_temp,
                extra_postargs=[*COMMON, *flags],
                depends=ext.depends,
            )
        target = Path(self.get_ext_fullpath(ext.name))
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            self.compiler.link_shared_object(
                objects, str(unfinished), libraries=["pthread"], target_lang="c++"
            )
            os.replace(unfinished, target)  # a failed link leaves no half-written library behind
        finally:
            unfinished.unlink(missing_ok=True)


setup(
    ext_modules=[
        Extension(
            "coterie.kernels._native",
            sources=[str(CSRC / name) for name in SOURCES],
            depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
            language="c++",
            optional=True,  # without a compiler the package installs, and uses the torch backend
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
