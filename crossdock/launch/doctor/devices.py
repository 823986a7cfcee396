"""Devices and the libraries that connect them: CUDA, NCCL, access between GPUs; where there is none, that."""

from typing import Any

from crossdock.launch.doctor.report import Check


def devices() -> list[Check]:
    """What torch finds."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as failure:
        return [Check("devices", "bad", f"torch does not load: {failure}", "install torch anew: pip install --force-reinstall torch")]
    checks = _gpus(torch) if torch.cuda.is_available() else [_cpu_alone(torch)]
    available = [name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
    if "gloo" not in available:
        checks.append(Check("process groups", "bad", ", ".join(available) or "none", "install a torch that has gloo"))
    elif torch.cuda.is_available() and "nccl" not in available:
        checks.append(Check("process groups", "bad", "gloo alone, and there are GPUs", "install a torch that has NCCL, or set device: cpu"))
    else:
        checks.append(Check("process groups", "ok", ", ".join(available)))
    return checks


def _cpu_alone(torch: Any) -> Check:
    cpu = f"CPU alone, {torch.backends.cpu.get_cpu_capability()}"
    if torch.version.cuda:
        remedy = "train on the CPU, or see `nvidia-smi` for the driver"
        return Check("devices", "note", f"{cpu}: torch is built for CUDA {torch.version.cuda}, and no GPU is usable", remedy)
    return Check("devices", "ok", f"{cpu}: torch is built without CUDA, so there is no NCCL and no GPU is looked for")


def _gpus(torch: Any) -> list[Check]:
    count, checks = torch.cuda.device_count(), []
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        finding = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute capability {properties.major}.{properties.minor}"
        checks.append(Check(f"cuda:{number}", "ok", finding))
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    checks.append(Check("CUDA", "ok", f"{torch.version.cuda}, NCCL {nccl}"))
    apart = [(a, b) for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)]
    return [*checks, peer_access(count, apart)]


def peer_access(num_gpus: int, apart: list[tuple[int, int]]) -> Check:
    """The finding on GPUs that cannot read each other's memory; `apart` lists their ordered pairs."""
    if num_gpus < 2:
        return Check("peer access", "ok", "one GPU, which has no peer here")
    if not apart:
        return Check("peer access", "ok", f"every GPU reaches the memory of the other {num_gpus - 1}")
    pairs = ", ".join(f"{a}->{b}" for a, b in apart[:6]) + (", ..." if len(apart) > 6 else "")
    remedy = "traffic goes through the host: see `nvidia-smi topo -m`, and IOMMU and ACS settings of virtual machines"
    return Check("peer access", "note", f"{len(apart)} of {num_gpus * (num_gpus - 1)} directed pairs lack it: {pairs}", remedy)
