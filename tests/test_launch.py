"""The cheap launch passes CUDA's driver what Triton's own launch passes it, bit for bit, with the Triton installed.

The driver is a stub (cuda_stub.c), so no GPU is needed; the kernels and launchers above it are the real ones.
"""

import contextlib
import ctypes
import gc
import re
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402

from gralora.ops import hopper, kernels, launch  # noqa: E402
from gralora.ops.interface import Conversion, FactorGradients, KernelUnavailable  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's driver is loaded, and no stub can take its place"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="Triton needs a C compiler to launch kernels"),
    pytest.mark.skipif(
        not Path(sysconfig.get_paths()["include"], "Python.h").exists(), reason="Triton needs Python's headers"
    ),
]
STREAM = 7


@pytest.fixture
def cuda(stub):
    """Of the driver: `launches` are those that reached it, with as many parameters as `sizes` has."""
    stub.launches, stub.sizes, stub.device = [], [], 0
    return stub


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """Triton's driver of a Hopper GPU, on top of cuda_stub.c."""
    folder = tmp_path_factory.mktemp("stub")
    source, include = Path(__file__).with_name("cuda_stub.c"), Path(nvidia.dirname, "include")
    library = folder / "libcuda.so.1"
    options = "-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{library.name}"
    subprocess.run(["gcc", *options, source, "-o", library], check=True)
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    seen = SimpleNamespace(launches=[], sizes=[], device=0, unloaded=ctypes.c_int.in_dll(driver, "unloaded"))

    @ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint), *[ctypes.c_void_p] * 2, ctypes.POINTER(ctypes.c_void_p))
    def report(numbers, stream, function, parameters):
        values = [ctypes.string_at(parameters[i], size) for i, size in enumerate(seen.sizes)]
        seen.launches.append((numbers[:8], stream, values))

    driver.set_report(report)
    counter = torch.zeros(1, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        driver = object.__new__(nvidia.CudaDriver)
        driver.utils, driver.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        driver.get_current_device = lambda: seen.device
        driver.get_current_stream = lambda device: STREAM
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(hopper, "_processors", lambda device: 132)
        patch.setattr(hopper, "_counter", lambda device: counter)
        yield seen


def parameter_sizes(compiled):
    """Bytes of each parameter of a compiled kernel."""
    entry = re.search(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)[1]
    found = re.findall(r"\.param (?:\.align \d+ )?\.[busf](\d+)[^\[,]*(?:\[(\d+)\])?", entry)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


@contextlib.contextmanager
def arguments_of_launches(seen):
    """Instead of launching, note which launcher was called with what."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launcher, "__call__", lambda *call: seen.append(call))
        yield


def check(cuda, compute, *args):
    """What `compute` launches reaches the driver alike by the cheap launch, first and later, and by Triton's own."""
    calls = []
    with arguments_of_launches(calls):
        compute(*args)
    for launcher, key, grid, tensors, numbers, constants, *tiled in calls:
        arguments = tensors, numbers, constants, *tiled
        cuda.sizes = parameter_sizes(launcher.compile(grid, *arguments))
        cuda.launches.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            launcher(key, grid, *arguments)
            launcher(key, grid, *arguments)
        assert all(launcher.launches.values()), "all of them are cheap"
        descriptors = launcher.described(*tiled or [launch.UNTILED])
        launcher.kernel[grid](*descriptors, *tensors, *numbers, *constants, **launcher.options)
        first, second, tritons = cuda.launches
        assert first == second == tritons
        numbers, stream, values = tritons
        assert numbers[:3] == list(grid) and stream == STREAM and sum(map(len, values)) >= 8 * len(tensors)


def draw(*size, dtype=torch.bfloat16):
    return torch.randn(*size).to(dtype)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_portable_kernels(factors, cuda):
    """With tensors of other addresses and alignments, too."""
    k, r = 2, 16
    for T in (64, 100):
        x, dy, g = draw(T, 64), draw(T, 96), draw(k, T, r)
        A, B = draw(k, 32, r, dtype=factors), draw(k, r, 48, dtype=factors)
        check(cuda, kernels.down, x, A, 0, 0.3, Conversion(B, B.half()))
        check(cuda, kernels.down, draw(T, 70)[:, 3:67], A, 4, 0.3)
        check(cuda, kernels.up, g, B, dy)
        check(cuda, kernels.factor_gradients, x, dy, g, g, A, B, A, x)
        check(cuda, kernels.factor_gradients, x, dy, g, g, A, None)
        check(cuda, kernels.dropout, x, 0.1, torch.tensor(0))
        check(cuda, kernels.delta_weight, A.float(), B.float(), 0.7)


@pytest.mark.parametrize("has_gradients", [False, True], ids=["", "gradients"])
def test_hopper_kernel(has_gradients, cuda):
    """With the same descriptors, of any layout, at the same addresses again and at others."""
    n_in, n_out, k, r = 128, 192, 2, 16
    layouts = [(256, False, False), (256, True, True), (200, False, True)]
    for T, w_transposed, b_transposed in layouts:
        weight = draw(n_in, n_out).mT if w_transposed else draw(n_out, n_in + 8)[:, :n_in]
        B = draw(k, n_out // k, r).mT if b_transposed else draw(k, r, n_out // k)
        h, z_grad, x_grad = draw(k, T, r), torch.empty(k, n_out // k, r), torch.empty(k, r, n_in // k).mT
        inputs = [(draw(T, n_out), draw(T, n_in), draw(k, T, r)) for _ in range(2)]
        for y, x, g in inputs + inputs:
            gradients = FactorGradients(draw(T, n_out), h, z_grad, x_grad) if has_gradients else None
            check(cuda, hopper.linear, y, x, weight, draw(n_out), g, B, gradients)


def test_every_release_is_tested():
    """`make test-triton` runs these tests with each release that has the cheap launch."""
    versions = re.search(r"^TRITON := (.*)", Path(__file__).parents[1].joinpath("Makefile").read_text(), re.MULTILINE)[
        1
    ]
    assert tuple(version.rpartition(".")[0] for version in versions.split()) == launch.RELEASES


@triton.jit
def _add_kernel(x_ptr, n, BLOCK: tl.constexpr):
    p = x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p, tl.load(p) + n)


@triton.jit
def _broken_kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr, tl.no_such_function(n))


def add(kernel=_add_kernel):
    launcher = launch.Launcher(__name__, kernel)
    return launcher, lambda: launcher(64, (1, 1, 1), (torch.zeros(64),), (3.0,), (64,))


def test_profilers_see_launches(cuda):
    """With a hook that profilers add, kernels are launched as Triton launches them."""
    (_, run), names = add(), []
    run()

    def hook(metadata):
        names.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        run()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    run()
    assert names == ["_add_kernel"]


def test_kernels_stay_loaded(cuda):
    """Also when Triton forgets them, which then unloads what nobody holds."""
    launcher, run = add()
    run()
    before = cuda.unloaded.value
    launcher.kernel.device_caches.clear()
    gc.collect()
    run()
    assert cuda.unloaded.value == before


@pytest.mark.parametrize("why", ["an unknown release", "a changed launcher"])
def test_jit_launch_where_the_cheap_one_is_unknown(why, cuda, monkeypatch):
    """It launches the same, warns once, and says so."""
    run = add()[1]
    run()
    assert launch.describe() == f"cheap launch, Triton {triton.__version__}"
    monkeypatch.setattr(launch, "_no_cheap_launch", None)
    if why == "an unknown release":
        monkeypatch.setattr(triton, "__version__", "99.1.0")
    else:
        monkeypatch.delattr(nvidia, "TMA_DTYPE_DEVICE_TO_HOST")
    cuda.launches.clear()
    with pytest.warns(RuntimeWarning, match=f"Triton {triton.__version__} .*not by the cheap launch") as warned:
        for _ in range(2):
            launcher, run = add()
            run()
            run()
    assert len(warned) == 1 and list(launcher.launches.values()) == [None] and len(cuda.launches) == 4
    assert launch.describe() == f"JIT launch, Triton {triton.__version__}"


def test_a_kernel_that_does_not_compile_is_unavailable(cuda):
    """The error names the kernel, Triton's version and the cause; it comes again at the next call."""
    _, run = add(_broken_kernel)
    for _ in range(2):
        with pytest.raises(KernelUnavailable, match="^_broken_kernel .*no_such_function") as raised:
            run()
        assert f"Triton {triton.__version__}: " in str(raised.value)
    assert not cuda.launches


def test_a_kernel_that_the_gpu_cannot_hold_is_unavailable(cuda):
    cuda.device = 1
    with pytest.raises(KernelUnavailable, match="_down_kernel .*shared memory") as raised:
        launcher = launch.Launcher(kernels.__name__, kernels._down_kernel)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_down", launcher)
            kernels.down(draw(64, 64), draw(2, 32, 16), 0, 1.0)
    assert raised.value.module == "kernels" and not cuda.launches


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError, MemoryError])
def test_errors_of_the_gpu_stay_what_they_are(error, cuda, monkeypatch):
    launcher, run = add()

    def fail(*_, **__):
        raise error("of the GPU")

    monkeypatch.setattr(launcher, "compile", fail)
    with pytest.raises(error, match="of the GPU"):
        run()
