"""The machine: which device and dtype to use, how much memory is free, and how much was used."""

import contextlib
import ctypes
import sys
from pathlib import Path

import torch
import torch.nn.functional as F


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the fastest one available. Raises a ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in available if available[device]) if name == "auto" else name
    if not available[name]:
        raise ValueError(f"there is no {name} device on this machine; try --device cpu")
    return torch.device(name)


def pick_dtype(
    dtype: torch.dtype | str, device: torch.device | str, stored: str | None
) -> tuple[torch.dtype, torch.device]:
    """The dtype and device for a model whose checkpoint is stored in dtype `stored`.

    "auto" is float32 on a CPU, because few CPUs are fast at prompts in 16 bits, and elsewhere the checkpoint's dtype.
    Raises a ValueError if there is no such dtype or device, or if the device cannot compute in that dtype.
    """
    try:
        device = torch.device(device)
        if dtype == "auto":
            dtype = "float32" if device.type == "cpu" else stored or "float32"
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        trial = torch.ones(1, dtype=dtype, device=device)  # type: ignore[arg-type] # a TypeError if there is none
        return F.gelu(trial).dtype, device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(f"the model cannot be built in {dtype} on {device}: {error}") from error


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate on a device, or None where that is unknown (MPS, macOS, Windows).

    On Linux this is what the kernel calls available, or what is left of a limit on this process: it belongs to a
    control group, as everything in a container does, and that group to others, each with its own limit. Pages of files
    count as free, because the kernel drops them first. Sources: proc(5); the kernel's cgroup-v2 and cgroup-v1/memory.

    Args:
        device: CUDA or CPU; others are unknown.
        root: the folder of /proc and /sys; tests use their own.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        meminfo = (root / "proc/meminfo").read_text()
        groups = (root / "proc/self/cgroup").read_text()
        free = [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        return None
    if device.type != "cpu" or not free:
        return None
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (mount / parent for parent in (group, *group.parents)):
            with contextlib.suppress(OSError, ValueError):  # no such file, as in a container, or no limit: "max"
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                total = "total_" * ("total_inactive_file" in stat)  # version 1 also has these for nested groups
                free.append(left + int(stat[f"{total}inactive_file"]) + int(stat[f"{total}active_file"]))
    return max(0, min(free))


def peak_memory(device: torch.device) -> str:
    """The peak memory of this process, on the GPU if it used one."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU"
    try:
        import resource  # not on Windows
    except ImportError:
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def anonymous_memory() -> float | None:
    """GB of this process's memory that the system cannot drop, as it can mapped files; None where that is unknown."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("RssAnon:")), None)


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks, such as a layer's results, for the next layer.

    By default it returns them to Linux, which has to provide the pages again, zeroed: a tenth of the time of a prompt
    (600 tokens, 1 B parameters). This applies to the whole process, which may keep half a gigabyte more.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # not in other C libraries
        libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD in malloc.h: how much may stay free at the end of the heap
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: how much more than needed the heap grows by
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks above 32 MiB are mostly returned at once


def map_large_blocks() -> None:
    """Makes glibc return freed blocks above 64 KiB to Linux at once, until `keep_freed_memory`.

    Blocks that stay between those of a temporary use would otherwise leave holes, and later work would fill them all.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
