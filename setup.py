"""Builds the native libraries of wsss_kernels. Metadata is in pyproject.toml.

Environment:
    WSSS_BUILD=auto|cpu|cuda|none   auto: CUDA if PyTorch is a CUDA build and an nvcc of its major version is there,
                                    else CPU if there is a C++ compiler, else pure Python.
    WSSS_SANITIZE=address,undefined an instrumented build (see `make asan`).
    TORCH_CUDA_ARCH_LIST            default "8.0;9.0+PTX".
    CUDA_HOME, CXX, MAX_JOBS        as usual.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
OLDEST_TORCH = (2, 10)
TARGET = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"


def note(message):
    print(f"wsss_kernels build: {message}", file=sys.stderr)


def stop(message):
    raise SystemExit(f"wsss_kernels: {message}")


def cuda_toolkit():
    """(home, library folder) of a toolkit that really holds nvcc, headers and libcudart_static; else None.

    The nvcc on PATH may be a wrapper script, so the toolkit's own idea of its root is asked first.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        answer = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"TOP=(\S+)", answer.stderr + answer.stdout)
        candidates += [os.path.realpath(top.group(1))] if top else []
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    for home in map(Path, filter(None, candidates)):
        headers = [home / d for d in ("include", "targets/x86_64-linux/include")]
        libraries = [home / d for d in ("lib64", "lib", "targets/x86_64-linux/lib")]
        library = next((d for d in libraries if (d / "libcudart_static.a").exists()), None)
        if (home / "bin/nvcc").exists() and library and any((d / "cuda_runtime.h").exists() for d in headers):
            return str(home), str(library)
    return None


def why_no_cuda(torch, toolkit):
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a CPU build"
    if toolkit is None:
        return "no usable CUDA toolkit was found (nvcc, cuda_runtime.h and libcudart_static.a; set CUDA_HOME)"
    answer = subprocess.run([f"{toolkit[0]}/bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    if release is None:
        return f"{toolkit[0]}/bin/nvcc --version does not answer: {answer.stderr.strip() or answer.stdout.strip()}"
    if release.group(1) != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release.group(1)}.{release.group(2)} but PyTorch was built with CUDA {torch.version.cuda}: their major versions must agree"
    return None


def plan():
    """(what to build: none, cpu or cuda; the CUDA toolkit or None)"""
    mode = os.environ.get("WSSS_BUILD", "auto").lower()
    if mode not in MODES:
        stop(f"WSSS_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return "none", None

    def give_up(reason):
        if mode != "auto":
            stop(f"WSSS_BUILD={mode}, but {reason}")
        note(f"pure Python, without compiled kernels: {reason}")
        return "none", None

    try:
        import torch
    except ImportError:
        return give_up("PyTorch is not installed where the build runs (install torch first and use --no-build-isolation, or let pip isolate the build)")
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        stop(f"PyTorch {torch.__version__} is too old: {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer is needed. Run: pip install --upgrade torch")
    if shutil.which((os.environ.get("CXX") or "c++").split()[0]) is None:
        return give_up("no C++ compiler was found ($CXX or c++)")
    if mode == "cpu":
        return "cpu", None
    toolkit = cuda_toolkit()
    reason = why_no_cuda(torch, toolkit)
    if reason is None:
        return "cuda", toolkit
    if mode == "cuda":
        stop(f"WSSS_BUILD=cuda, but {reason}")
    note(f"CPU kernels only: {reason}")
    return "cpu", None


def arch_flags():
    """-gencode flags of our own: PyTorch's logic fails where no GPU is visible."""
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if number:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def sources(pattern):
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def extensions(build, toolkit):
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    sanitize = os.environ.get("WSSS_SANITIZE")
    optimise = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined"] if sanitize else ["-O3", "-g0"]
    cxx = ["-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", TARGET, *optimise]
    common = {
        "language": "c++",
        "include_dirs": [str(ROOT / "csrc/include"), str(ROOT / "csrc"), *include_paths()],
        "library_dirs": library_paths(),
        "extra_link_args": [f"-fsanitize={sanitize}"] if sanitize else ["-Wl,--as-needed", "-g0"],
        "depends": sources("csrc/**/*.h") + sources("csrc/**/*.inc") + sources("csrc/**/*.cuh"),
    }
    info = f'-DWSSS_BUILD_INFO="built with PyTorch {torch.__version__}, CUDA {torch.version.cuda if build == "cuda" else "none"}"'
    found = [
        Extension(
            "wsss_kernels._C",
            ["csrc/module.cpp", *sources("csrc/ops/*/*_ops.cpp")],
            libraries=["torch", "torch_cpu", "c10"],
            extra_compile_args={"cxx": [*cxx, info]},
            **{**common, "include_dirs": [*common["include_dirs"], pybind11.get_include()]},
        )
    ]
    if build == "cuda":
        home, library = toolkit
        os.environ["CUDA_HOME"] = home
        nvcc = ["-O3", "-std=c++17", "-DUSE_CUDA", TARGET, "-Xptxas=-v", "-Xfatbin=-compress-all", "--expt-relaxed-constexpr"]
        nvcc += ["--expt-extended-lambda", "--compiler-options", "-fvisibility=hidden", *arch_flags()]
        found.append(
            Extension(
                "wsss_kernels._cuda",
                sources("csrc/ops/*/*_cuda.cu"),
                libraries=["torch", "torch_cpu", "torch_cuda", "c10", "cudart_static", "rt", "dl", "pthread"],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                **{**common, "include_dirs": [*common["include_dirs"], f"{home}/include"], "library_dirs": [*common["library_dirs"], library]},
            )
        )
    return found


def main():
    build, toolkit = plan()
    note(f"building {build}")
    if build == "none":
        return setup()
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit[0]  # read by torch.utils.cpp_extension when it is imported
    from torch.utils.cpp_extension import BuildExtension

    return setup(ext_modules=extensions(build, toolkit), cmdclass={"build_ext": BuildExtension})


main()
