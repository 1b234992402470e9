"""Time and memory of steps: functions without arguments that do the same work at every call."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


def interleave(
    steps: Mapping[str, Step], device: str, rounds: int, repeats: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time every step in turn, round by round, so that all methods see the same machine.

    A GPU is never left idle between steps, as it is not in training: the host runs ahead, and a card at its power
    limit has the same clocks for all.

    Returns:
        Name of the step -> milliseconds per call: the median `time_ms`, and the 20th and 80th percentiles.
    """
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(warmup):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            samples[name].append(_run(step, device, repeats))
    if device == "cuda":
        torch.cuda.synchronize()
    times = {name: [sample() / repeats for sample in own] for name, own in samples.items()}
    return {
        name: dict(zip(("p20_ms", "p80_ms"), _spread(own), strict=True)) | {"time_ms": statistics.median(own)}
        for name, own in times.items()
    }


def _run(step: Step, device: str, repeats: int) -> Callable[[], float]:
    """Run a step several times. The result gives the milliseconds that this took, once the device is done."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        taken = (time.perf_counter() - start) * 1e3
        return lambda: taken
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(repeats):
        step()
    last.record()
    return lambda: first.elapsed_time(last)


def _spread(times: list[float]) -> tuple[float, float]:
    if len(times) < 5:
        return min(times), max(times)
    quintiles = statistics.quantiles(times, n=5)
    return quintiles[0], quintiles[-1]


def on_gpu(step: Step) -> dict[str, float]:
    """What a step takes of the GPU itself.

    Returns:
        peak_mib: the most memory in use during a step, weights included.
        step_mib: the part of it that was not in use before the step.
        gpu_ms: the sum of its kernels' times, which is what the step takes where the host keeps up.
    """
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return {"peak_mib": peak / 2**20, "step_mib": (peak - before) / 2**20, "gpu_ms": _kernel_ms(step)}


def _kernel_ms(step: Step, repeats: int = 4) -> float:
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.self_device_time_total for event in kernels) / repeats / 1e3


def on_cpu(step: Step) -> dict[str, float]:
    """`step_mib` of `on_gpu`, of a step on the CPU: the most that its tensors have in use at once."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return {"step_mib": max(in_use, default=0) / 2**20}


def measure(
    steps: Mapping[str, Step], device: str, rounds: int, repeats: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """`interleave`, and what `on_gpu` or `on_cpu` tells."""
    timed = interleave(steps, device, rounds, repeats, warmup)
    for name, step in steps.items():
        timed[name] |= on_gpu(step) if device == "cuda" else on_cpu(step)
    return timed


def host_us(device: str) -> float:
    """Microseconds that a small product of torch takes the host: steps of many small operations wait for hosts."""
    x = torch.ones(16, 16, device=device)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        torch.nn.functional.linear(x, x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
