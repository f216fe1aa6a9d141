"""Builds the native libraries of wsss_kernels. Metadata is in pyproject.toml.

Environment:
    WSSS_BUILD=auto|cpu|cuda|none   auto: CUDA if PyTorch is a CUDA build and an nvcc of its major version is there,
                                    else CPU if there is a C++ compiler, else pure Python.
    WSSS_SANITIZE=address,undefined an instrumented build (see `make asan`).
    TORCH_CUDA_ARCH_LIST            default "8.0;9.0+PTX".
    CUDA_HOME, CXX, MAX_JOBS        as usual.

A GPU need not be visible: the CUDA kernels are compiled wherever the toolkit is. What a build does not produce for lack
of a tool is said once at import and by wsss_kernels.info(); an error of the compiler itself always stops the build.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
COMPILING = {"build", "build_ext", "bdist", "bdist_wheel", "develop", "editable_wheel", "install"}
OLDEST_TORCH = (2, 10)
OLDEST_SETUPTOOLS = 77  # the first that reads the licence entry of pyproject.toml
TARGET = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"


def note(message):
    print(f"wsss_kernels build: {message}", file=sys.stderr)


def stop(message):
    raise SystemExit(f"wsss_kernels: {message}")


def toolkit_places():
    """Where a toolkit may be. CUDA_HOME is obeyed; otherwise the nvcc on PATH, which may be a wrapper script, is asked."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return [Path(named)]
    places = [Path("/usr/local/cuda")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        answer = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"TOP=(\S+)", answer.stderr + answer.stdout)
        places = [*([Path(top.group(1)).resolve()] if top else []), Path(nvcc).resolve().parent.parent, *places]
    return places


def cuda_toolkit():
    """(home, library folder) of a toolkit that really holds nvcc, headers and libcudart_static; else None."""
    for home in toolkit_places():
        headers = [home / "include", *home.glob("targets/*/include")]
        libraries = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        library = next((d for d in libraries if (d / "libcudart_static.a").exists()), None)
        if (home / "bin/nvcc").exists() and library and any((d / "cuda_runtime.h").exists() for d in headers):
            return str(home), str(library)
    return None


def why_no_cuda(torch, toolkit):
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is not a CUDA build"
    if toolkit is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"in CUDA_HOME={named}" if named else "(set CUDA_HOME)"
        return f"no usable CUDA toolkit (nvcc, cuda_runtime.h and libcudart_static.a) was found {where}"
    answer = subprocess.run([f"{toolkit[0]}/bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    if release is None:
        return f"{toolkit[0]}/bin/nvcc --version does not answer: {answer.stderr.strip() or answer.stdout.strip()}"
    if release.group(1) != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is CUDA {release.group(1)}.{release.group(2)} but PyTorch was built with CUDA {torch.version.cuda}: "
            "their major versions must agree (set CUDA_HOME to another toolkit, or install another PyTorch)"
        )
    return None


def why_no_compiler():
    if sys.platform == "win32":
        return "the compiled kernels are for Linux and macOS"
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler was found ({compiler}; install g++ or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers were not found (Python.h; on Debian and Ubuntu install python3-dev)"
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
        return give_up(
            "PyTorch is not installed where the build runs (install torch first and use --no-build-isolation, or let pip isolate the build)"
        )
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        stop(
            f"PyTorch {torch.__version__} is too old: {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer is needed. Run: pip install --upgrade torch"
        )
    reason = why_no_compiler()
    if reason is not None:
        return give_up(reason)
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


def flags():
    """(compiler flags, linker flags)"""
    compile_flags = ["-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi", TARGET]
    sanitize = os.environ.get("WSSS_SANITIZE")
    if sanitize:
        compile_flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}", "-fno-sanitize-recover=undefined"]
        return compile_flags, [f"-fsanitize={sanitize}"]
    return [*compile_flags, "-O3", "-g0"], ["-g0"] if sys.platform == "darwin" else ["-Wl,--as-needed", "-g0"]


def extensions(build, toolkit):
    try:
        import pybind11
    except ImportError:
        stop("pybind11 is not installed where the build runs. Run: pip install pybind11 ninja setuptools wheel")
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    cxx, link = flags()
    includes = [str(ROOT / "csrc/include"), str(ROOT / "csrc"), *include_paths()]
    common = {
        "language": "c++",
        "extra_link_args": link,
        "depends": ["setup.py", *sources("csrc/**/*.h"), *sources("csrc/**/*.inc"), *sources("csrc/**/*.cuh")],
    }
    cuda_sources = sources("csrc/ops/*/*_cuda.cu") if build == "cuda" else []
    info = f"built with PyTorch {torch.__version__}, CUDA {torch.version.cuda if cuda_sources else 'none'}"
    found = [
        Extension(
            "wsss_kernels._C",
            ["csrc/module.cpp", *sources("csrc/ops/*/*_ops.cpp")],
            include_dirs=[pybind11.get_include(), *includes],  # first: PyTorch brings a pybind11 of its own that refuses the stable ABI
            library_dirs=library_paths(),
            libraries=["torch", "torch_cpu", "c10"],
            extra_compile_args={"cxx": [*cxx, f'-DWSSS_BUILD_INFO="{info}"']},
            **common,
        )
    ]
    if cuda_sources:
        home, library = toolkit
        nvcc = ["-O3", "-std=c++17", "-DUSE_CUDA", TARGET, "-Xptxas=-v", "-Xfatbin=-compress-all", "--expt-relaxed-constexpr"]
        nvcc += ["--expt-extended-lambda", "--compiler-options", "-fvisibility=hidden", *arch_flags()]
        found.append(
            Extension(
                "wsss_kernels._cuda",
                cuda_sources,
                include_dirs=[*includes, f"{home}/include"],
                library_dirs=[*library_paths(), library],
                libraries=["torch", "torch_cpu", "torch_cuda", "c10", "cudart_static", "rt", "dl", "pthread"],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                **common,
            )
        )
    return found


def forget_stale(names):
    """Removes libraries of an earlier build that this build does not replace: they would be installed or loaded."""
    folders = [*ROOT.glob("build/lib*/wsss_kernels")]
    if {"develop", "editable_wheel", "--inplace", "-i"} & set(sys.argv):
        folders.append(ROOT / "wsss_kernels")
    for folder in folders:
        for library in (path for name in ("_C", "_cuda") if name not in names for path in folder.glob(f"{name}.*so")):
            library.unlink()


def main():
    if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        stop(
            f"setuptools {setuptools.__version__} is too old: {OLDEST_SETUPTOOLS} or newer is needed. Run: pip install --upgrade setuptools"
        )
    if not COMPILING & set(sys.argv):
        return setup()
    build, toolkit = plan()
    note(f"building {build}")
    if build == "none":
        forget_stale([])
        return setup()
    # pip --no-build-isolation does not put ninja's folder on PATH when the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit[0]  # read by torch.utils.cpp_extension when it is imported
    from torch.utils.cpp_extension import BuildExtension

    modules = extensions(build, toolkit)
    forget_stale([module.name.rpartition(".")[2] for module in modules])
    return setup(ext_modules=modules, cmdclass={"build_ext": BuildExtension})


main()
