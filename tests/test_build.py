"""What setup.py decides and says, what the libraries depend on, what happens where they are absent or broken."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import wsss_kernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(wsss_kernels.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("_*.so"))
FAKE_BUILD_EXTENSION = """
from setuptools.command.build_ext import build_ext
def include_paths(): return []
def library_paths(): return []
class BuildExtension(build_ext):
    def run(self):
        for extension in self.extensions:
            print("would build", extension.name, extension.sources, extension.extra_compile_args.get("nvcc"))
"""


@pytest.fixture
def build(tmp_path):
    """Runs the project's setup.py with a PyTorch that only has a version: `build(torch="2.9.1", cuda=None, WSSS_BUILD=...)`."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    source = tmp_path / "csrc/ops/some/some_cuda.cu"
    source.parent.mkdir(parents=True)
    source.touch()

    def run(*, torch: str | None, cuda: str | None = None, **environment: str) -> subprocess.CompletedProcess:
        fake = tmp_path / "fake/torch"
        (fake / "utils").mkdir(parents=True)
        if torch is None:
            (fake / "__init__.py").write_text("raise ImportError('no torch here')")
        else:
            (fake / "__init__.py").write_text(f"__version__ = {torch!r}\nclass version: cuda = {cuda!r}\n")
        (fake / "utils/__init__.py").touch()
        (fake / "utils/cpp_extension.py").write_text(FAKE_BUILD_EXTENSION)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("WSSS_", "CUDA_", "TORCH_", "CXX"))}
        env = {**kept, "PYTHONPATH": str(fake.parent), "CUDA_HOME": str(tmp_path / "cuda"), **environment}
        return subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def toolkit(folder: Path, release: str) -> None:
    """A CUDA toolkit that answers `nvcc --version` and can do nothing else."""
    for part in ("bin", "include", "lib64"):
        (folder / part).mkdir(parents=True)
    (folder / "include/cuda_runtime.h").touch()
    (folder / "lib64/libcudart_static.a").touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.20'\n")
    nvcc.chmod(0o755)


@pytest.mark.parametrize("mode", ["auto", "cpu", "cuda"])
def test_old_pytorch_is_refused(build, mode):
    result = build(torch="2.9.1+cu128", cuda="12.8", WSSS_BUILD=mode)
    assert result.returncode == 1
    assert "PyTorch 2.9.1+cu128 is too old: 2.10 or newer is needed. Run: pip install --upgrade torch" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_mode(build):
    result = build(torch="2.11.0", WSSS_BUILD="gpu")
    assert result.returncode == 1 and "WSSS_BUILD must be one of auto, cpu, cuda, none, got 'gpu'" in result.stderr


def test_pure_python_on_request(build):
    result = build(torch="2.9.1", WSSS_BUILD="none")
    assert result.returncode == 0 and "building none" in result.stderr and "would build" not in result.stdout


@pytest.mark.parametrize(
    ("torch_version", "environment", "reason"),
    [
        (None, {}, "PyTorch is not installed where the build runs"),
        ("2.11.0", {"CXX": "no-such-c++"}, "no C++ compiler was found (no-such-c++; install g++ or set CXX)"),
    ],
    ids=["no torch", "no compiler"],
)
def test_what_is_missing_gives_pure_python_or_an_error(build, torch_version, environment, reason):
    result = build(torch=torch_version, **environment)
    assert result.returncode == 0 and "would build" not in result.stdout
    assert f"wsss_kernels build: pure Python, without compiled kernels: {reason}" in result.stderr


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_an_explicit_mode_does_not_fall_back(build, mode):
    result = build(torch="2.11.0", CXX="no-such-c++", WSSS_BUILD=mode)
    assert result.returncode == 1 and f"wsss_kernels: WSSS_BUILD={mode}, but no C++ compiler was found" in result.stderr
    assert "Traceback" not in result.stderr


def cuda_cases():
    return [
        pytest.param("2.11.0+cpu", None, "13.0", "PyTorch 2.11.0+cpu is not a CUDA build", id="CPU PyTorch"),
        pytest.param(
            "2.11.0",
            "13.0",
            None,
            "no usable CUDA toolkit (nvcc, cuda_runtime.h and libcudart_static.a) was found in CUDA_HOME=",
            id="no toolkit",
        ),
        pytest.param(
            "2.11.0",
            "13.0",
            "12.4",
            "nvcc is CUDA 12.4 but PyTorch was built with CUDA 13.0: their major versions must agree",
            id="other major",
        ),
    ]


@pytest.mark.parametrize(("version", "cuda", "release", "reason"), cuda_cases())
@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_cuda_that_does_not_fit(build, tmp_path, mode, version, cuda, release, reason):
    if release:
        toolkit(tmp_path / "cuda", release)
    result = build(torch=version, cuda=cuda, WSSS_BUILD=mode)
    if mode == "cuda":
        assert result.returncode == 1 and f"wsss_kernels: WSSS_BUILD=cuda, but {reason}" in result.stderr
        assert "Traceback" not in result.stderr
    else:
        assert result.returncode == 0 and f"CPU kernels only: {reason}" in result.stderr
        assert "wsss_kernels._C" in result.stdout and "wsss_kernels._cuda" not in result.stdout


def test_cuda_of_the_same_major_version(build, tmp_path):
    toolkit(tmp_path / "cuda", "13.2")
    result = build(torch="2.15.0+cu130", cuda="13.0", TORCH_CUDA_ARCH_LIST="8.6;12.0+PTX")
    assert result.returncode == 0, result.stderr
    assert "would build wsss_kernels._cuda ['csrc/ops/some/some_cuda.cu']" in result.stdout
    for flag in ("arch=compute_86,code=sm_86", "arch=compute_120,code=sm_120", "arch=compute_120,code=compute_120"):
        assert flag in result.stdout


@pytest.mark.skipif(not LIBRARIES, reason="installed without compiled libraries")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.partition(".")[0])
def test_libraries_use_only_the_stable_abi(library):
    names = subprocess.run(["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    unstable = re.findall(r"^.*\b(?:at|c10|caffe2|torch)::.*$", names, re.MULTILINE)
    assert not unstable, "C++ symbols of PyTorch change between its versions:\n" + "\n".join(unstable[:20])
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"libcudart|libtorch_python|libpython", needed), needed


def copy_of_package(folder: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, folder / "wsss_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")))


def import_copy(folder: Path, code: str) -> str:
    """Imports the copy, then runs `code` with the warnings of the import in `caught`."""
    program = f"import warnings, torch\nwith warnings.catch_warnings(record=True) as caught:\n    warnings.simplefilter('always')\n    import wsss_kernels\n{code}"
    env = {k: v for k, v in os.environ.items() if k not in ("WSSS_CUDA_EMULATOR", "WSSS_KERNELS_BACKEND")}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={**env, "PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


RUN = """
messages = [str(w.message) for w in caught if 'wsss' in str(w.message) or 'kernels' in str(w.message)]
assert len(messages) == 1, messages
print(messages[0])
print(wsss_kernels.info())
image, mask = torch.rand(1, 3, 9, 7), torch.rand(1, 2, 9, 7)
print('chosen', wsss_kernels.explain('par', image, mask).chosen, tuple(wsss_kernels.par(image, mask, [1], 1).shape))
"""


def test_absent_library(tmp_path):
    copy_of_package(tmp_path)
    said = import_copy(tmp_path, RUN)
    assert "installed without its compiled kernels" in said.splitlines()[0] and "pip install" in said.splitlines()[0]
    assert "cpu kernels   missing: wsss_kernels was installed without" in said
    assert "chosen reference (1, 2, 9, 7)" in said


def test_broken_library(tmp_path):
    (copy_of_package(tmp_path) / f"_C.cpython-{sys.version_info[0]}{sys.version_info[1]}-x86_64-linux-gnu.so").write_bytes(b"not a library")
    said = import_copy(tmp_path, RUN)
    assert "present but cannot be loaded" in said.splitlines()[0] and "pip install" in said.splitlines()[0]
    assert "cpu kernels   missing: the compiled kernels are present but cannot be loaded" in said
    assert "chosen reference (1, 2, 9, 7)" in said


@pytest.mark.skipif(not LIBRARIES or torch.version.cuda is None, reason="needs the CPU library and a CUDA PyTorch")
def test_broken_cuda_library(tmp_path):
    package = copy_of_package(tmp_path)
    shutil.copy(next(p for p in LIBRARIES if p.name.startswith("_C.")), package)
    (package / "_cuda.so").write_bytes(b"not a library")
    said = import_copy(tmp_path, RUN)
    assert "the CUDA kernels are present but cannot be loaded" in said.splitlines()[0] and "pip install" in said.splitlines()[0]
    assert "chosen cpu (1, 2, 9, 7)" in said


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source package, made from a copy: setuptools remembers files of earlier builds in the tree that it works in."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    (Path(tree) / "wsss_kernels/_C.stale.so").touch()
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", str(folder), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.tar.gz"))


def test_sdist_holds_what_an_installation_needs_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        str(p.relative_to(ROOT)) for folder in ("csrc", "wsss_kernels", "wsss_models") for p in (ROOT / folder).rglob("*") if p.is_file()
    }
    wanted = {s for s in sources if Path(s).suffix in (".h", ".inc", ".cuh", ".cu", ".cpp", ".py")}
    assert wanted | {"LICENSE", "README.md", "setup.py", "pyproject.toml", "CMakeLists.txt"} <= names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "docs", ".ci")) or n.endswith((".so", ".npz", ".npy", ".pyc"))]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "cpu", "none"])
def test_sdist_installs(sdist, tmp_path, mode):
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(tmp_path), str(sdist)]
    result = subprocess.run(command, env={**os.environ, "WSSS_BUILD": mode}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    said = import_copy(tmp_path, "print(wsss_kernels.__file__)\nprint(wsss_kernels.info())\nprint(len(caught))")
    assert said.startswith(str(tmp_path))
    assert ("cpu kernels   missing" in said) == (mode == "none")
