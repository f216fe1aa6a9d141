#!/usr/bin/env bash
# Usage: tests/asan.sh PYTHON [pytest arguments]
# Runs tests against a copy of the tree in build/asan whose libraries report every access out of bounds and every undefined
# operation. The reports go to files, because pytest would swallow them together with the output of a crashed process.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
copy=$PWD/build/asan
reports=$copy/reports
rm -rf "$copy"/{reports,csrc,tests,benchmarks} "$copy"/wsss_*  # what is compiled already stays
mkdir -p "$reports"
tar --exclude='*.so' --exclude=__pycache__ -cf - setup.py pyproject.toml README.md LICENSE csrc wsss_* tests benchmarks | tar -xf - -C "$copy"

cd "$copy"
WSSS_BUILD=cpu WSSS_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace > build.log 2>&1 || {
    cat build.log >&2
    exit 1
}

export ASAN_OPTIONS=detect_leaks=0:log_path=$reports/asan
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$reports/ubsan
# Without PYTHONMALLOC=malloc, small arrays of Python would come from pools that the sanitizer cannot look into.
export PYTHONMALLOC=malloc PYTHONPATH=$copy
# Python itself does not link libstdc++: unless it is there from the start, the sanitizer finds no __cxa_throw to wrap, and the
# first library that throws (Triton's does, on import) ends the process.
status=0
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)" "$python" -m pytest -q -p no:cacheprovider "$@" || status=$?
if compgen -G "$reports/*" > /dev/null; then
    cat "$reports"/*
    echo "asan: the sanitizers reported errors (above)" >&2
    exit 1
fi
exit $status
