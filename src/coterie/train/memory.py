"""How much memory a piece of work needed at most."""

import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Context manager: `bytes` is the peak while inside, of one device.

    On CUDA that is what the allocator gave to tensors. On a CPU it is the resident memory of the whole
    process: on Linux its peak is reset on entry; where the system does not allow that (other systems, some
    containers), it is the peak since the process began, and `since_start` is True.

    Args:
        device: where the work runs; None for CUDA when there is one, else the CPU.

    >>> with PeakMemory("cpu") as peak:
    ...     block = torch.ones(10_000_000)
    >>> peak.bytes > 40_000_000
    True
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.bytes = 0
        self.since_start = False

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.since_start = not _reset_resident_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.since_start:
            unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        else:
            self.bytes = _resident_peak()


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: peak resident size := resident size, proc(5)
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
