#!/usr/bin/env bash
# The native library under AddressSanitizer and UndefinedBehaviorSanitizer, through its own tests.
# Run from the repository's root; PYTHON names the interpreter. Leaves build/sanitize behind.
set -euo pipefail

python=${PYTHON:-python}
compiler=${CXX:-g++}
source=src/coterie/kernels/csrc
build=build/sanitize
mkdir -p "$build"

common=(-std=c++17 -O1 -g -fPIC -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
        -fvisibility=hidden -Wall -Wextra -Wno-psabi)
avx512=(-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512)
jobs=()
compile() { # file, flags…
  "$compiler" "${common[@]}" "${@:2}" -c "$source/$1.cpp" -o "$build/$1.o" & jobs+=($!)
}
compile threads
compile memory
compile profile
compile library
compile isa_portable
if [ "$(uname -m)" = x86_64 ]; then
  compile isa_avx2 -mavx2 -mfma
  compile isa_avx512 "${avx512[@]}"
  compile isa_avx512_bf16 "${avx512[@]}" -mavx512bf16
fi
for job in "${jobs[@]}"; do wait "$job"; done
"$compiler" -shared -fsanitize=address,undefined "$build"/*.o -lpthread -o "$build/_native.so"

# Leaks are not looked for: Python and torch keep memory until the process ends. torch.compile starts a
# compiler of its own, which the preloaded sanitizer would check too.
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  COTERIE_NATIVE_LIBRARY="$PWD/$build/_native.so" \
  "$python" -m pytest tests/kernels/test_native.py tests/kernels/test_prepack.py tests/kernels/test_low_bit.py -q -k "not compiles" "$@"
