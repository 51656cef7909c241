"""What this installation can do, found by trying it."""

import importlib.util
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch

import coterie
from coterie import kernels
from coterie.report import print_table


def examine() -> dict[str, Any]:
    """Versions, threads, kernel backends and extras.

    Every backend computes a small problem and is compared with the reference, so that "works" is measured.
    `healthy` is False when a backend that is offered gives wrong numbers, or COTERIE_KERNEL names none.

    >>> examine()["healthy"]
    True
    """
    backends = {name: _try(name) for name in kernels.available_backends()}
    try:
        default = kernels.default_backend()
    except ValueError as error:
        default = str(error)
    return {
        "healthy": default in backends and all(found == "works" for found in backends.values()),
        "versions": {
            "coterie": coterie.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "accelerate", "safetensors")},
        },
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "kernels": {"default": default, **backends, "native kernel": _native()},
        "extras": _extras(),
    }


def print_findings(findings: dict[str, Any]) -> None:
    """One table on standard output."""
    rows = [
        [f"{section}: {name}", "none" if value is None else str(value)]
        for section in ("versions", "machine", "kernels", "extras")
        for name, value in findings[section].items()
    ]
    print_table("coterie doctor", ["", "found"], rows)


def _try(backend: str) -> str:
    generator = torch.Generator().manual_seed(0)
    x_TD, weights_TK = torch.randn(16, 8, generator=generator), torch.rand(16, 2, generator=generator)
    w_in, w_out = torch.randn(4, 24, 8, generator=generator), torch.randn(4, 8, 12, generator=generator)
    dispatch = kernels.sort_by_expert(torch.rand(16, 4, generator=generator).argsort(1)[:, :2], 4)
    try:
        ours, truth = (
            kernels.grouped_mlp(x_TD, weights_TK, dispatch, w_in, w_out, backend=name)
            for name in (backend, "reference")
        )
    except (RuntimeError, OSError) as error:
        return f"fails: {error}".splitlines()[0]
    return "works" if torch.allclose(ours, truth, atol=1e-5) else "gives wrong numbers"


def _native() -> str:
    reason = kernels.native.why_unavailable()
    return f"absent: {reason}" if reason else f"instruction set {kernels.native.instruction_set()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extras() -> dict[str, str]:
    """For each extra of the package: installed, or the packages it lacks."""
    missing: dict[str, list[str]] = {}
    within: dict[str, list[str]] = {}  # extras that an extra is made of
    for requirement in requires("coterie") or []:
        spec, _, marker = requirement.partition(";")
        if "extra ==" not in marker:
            continue
        extra = marker.split("extra ==")[1].strip(" '\")")
        name = re.split(r"[\[<>=! ]", spec)[0]
        missing.setdefault(extra, [])
        if name == "coterie":
            within.setdefault(extra, []).extend(re.findall(r"\[(.*)\]", spec)[0].split(","))
        elif _version(name) is None and importlib.util.find_spec(name) is None:
            missing[extra].append(name)

    def lacked(extra: str) -> list[str]:
        inner = [name for part in within.get(extra, []) for name in lacked(part)]
        return sorted({*missing.get(extra, []), *inner})

    return {
        extra: f"lacks {', '.join(lacked(extra))}: pip install 'coterie[{extra}]'"
        if lacked(extra)
        else "installed"
        for extra in missing
    }
