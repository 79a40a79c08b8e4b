#!/usr/bin/env bash
# Builds, checks and times everything that needs a GPU, in one call of less than 10 minutes on a machine that has one, the
# most important first, and prints results as they come. What fails or takes too long stops nothing but itself; nothing
# runs longer than GPU_SECONDS (570) after the start.
#   every expert kernel against the reference in double, over poisoned memory, rows alone bit for bit the same
#   the trunk's tests (products, attention, whole steps beside the CPU's) on the GPU instead of the stand-in
#   times beside the device's copy and matmul rates, and beside PyTorch and Triton where python3 has them
#   the bundled model with its experts, its trunk, and both on the GPU: greedy text beside the CPU's
#   one layer of DeepSeek-V3, 256 experts of 11.4 GB in all, resident on one node: its round trips through gRPC, broken down
#   the expert kernels in small sizes under compute-sanitizer
#
#   tests/gpu.sh [cuda:N]    needs the driver, and either cargo with this project's crates or what --pack made
#   tests/gpu.sh --pack      builds target/gpu, 60 MB without symbols, to be taken to a machine without cargo
# Ends with 0 if all went well, 2 where there is no device, else 1; a section that was left out says why.
set -uo pipefail
cd "$(dirname "$0")/.."
packed=$PWD/target/gpu

pack() {
  mkdir -p "$packed"
  cargo build --release --locked && install -s target/release/moemesh "$packed/moemesh" || return
  local package test built
  for test in kernels:trunk model:gpu_trunk; do
    package=${test%:*} test=${test#*:}
    built=$(cargo test --release --locked -p "$package" --test "$test" --no-run --message-format=json |
      sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)
    [ -n "$built" ] && install -s "$built" "$packed/$test" || return
  done
}

if [ "${1:-}" = --pack ]; then
  pack
  exit
fi
device=${1:-cuda:0}
failed=
began=$SECONDS
ends=$((began + ${GPU_SECONDS:-570}))

# Runs a function as a section.
section() { # NAME FUNCTION
  local start=$SECONDS
  printf '\n== %s\n' "$1"
  "$2" || { failed+=" '$1'" && echo "FAILED: $1"; }
  echo "($((SECONDS - start)) s, $((SECONDS - began)) s in all)"
}
# At most so many seconds, and no longer than there are.
within() { # SECONDS COMMAND...
  local left=$((ends - SECONDS)) limit=$1
  shift
  [ "$left" -gt 0 ] || { echo "no time is left" >&2; return 124; }
  timeout --kill-after=5 $((limit < left ? limit : left)) "$@"
}

if command -v cargo >/dev/null; then
  section "building" pack
fi
moemesh=$packed/moemesh
[ -x "$moemesh" ] || { echo "there is no $moemesh and no cargo to build it: tests/gpu.sh --pack makes it" >&2; exit 1; }

folder=$(mktemp -d)
mesh=
trap '[ -z "$mesh" ] || kill "$mesh"; rm -rf "$folder"' EXIT
# The floor needs cuBLASLt, which PyTorch or a toolkit brings, under a name with a version that is not looked for.
libraries=
site=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)
for library in "$site"/nvidia/*/lib/libcublasLt.so.* /usr/local/cuda*/lib64/libcublasLt.so.*; do
  [ -e "$library" ] || continue
  mkdir "$folder/lib" && ln -s "$library" "$folder/lib/libcublasLt.so"
  libraries=$folder/lib:${library%/*}
  break
done

kernels() {
  within 100 "$moemesh" bench device --device "$device" --check 2>&1 | tee "$folder/checked"
}
test_of() { # PACKAGE'S FOLDER, TEST, FILTER...
  (cd "$1" && MOEMESH_TEST_GPU=${device#cuda:} within 60 "$packed/$2" "${@:3}")
}
trunk() {
  local ended=0
  # The other tests of this one call single kernels of the stand-in.
  test_of model/kernels trunk product:: waves:: || ended=1
  test_of model gpu_trunk || ended=1
  return $ended
}
times() {
  LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries within 150 \
    "$moemesh" bench device --device "$device" --lines "$folder/ours.jsonl"
}
peers() {
  python3 -c "import torch" 2>/dev/null || { echo "python3 has no torch: left out"; return; }
  within 60 python3 -u tests/peers/grouped_ffn.py --device "$device" --check || echo "Triton's results are not right, or there is none"
  within 150 python3 -u tests/peers/grouped_ffn.py --device "$device" --beside "$folder/ours.jsonl"
}

generate() { # FILE of configuration
  local port=$((20000 + RANDOM % 20000)) stop=$((SECONDS + 40 < ends ? SECONDS + 40 : ends))
  "$moemesh" up --no-demo --expert-nodes 1 --http "127.0.0.1:$port" --config "$1" >"$folder/log" 2>&1 &
  mesh=$!
  while [ $SECONDS -lt $stop ] && kill -0 "$mesh" 2>/dev/null; do
    if within 20 "$moemesh" generate "Once upon a time" --max-tokens 64 --url "http://127.0.0.1:$port" 2>"$folder/error"; then
      kill "$mesh"
      wait "$mesh"
      mesh=
      return 0
    fi
    sleep 0.2
  done
  kill "$mesh" 2>/dev/null; wait "$mesh"; mesh=
  tail -n 20 "$folder/log" "$folder/error" >&2
  return 1
}
bundled() {
  local what experts ended=0
  experts=$(printf '[expert-node]\ndevice = "%s"\ndevice_memory = 1073741824\n' "$device")
  : >"$folder/cpu.toml"
  printf '[router]\nexpert_device = "cuda"\n%s\n' "$experts" >"$folder/experts.toml"
  printf '[router]\ndevice = "%s"\n' "$device" >"$folder/trunk.toml"
  printf '[router]\ndevice = "%s"\nexpert_device = "cuda"\n%s\n' "$device" "$experts" >"$folder/both.toml"
  generate "$folder/cpu.toml" >"$folder/cpu.txt" || return
  for what in experts trunk both; do
    generate "$folder/$what.toml" >"$folder/$what.txt" || { echo "$what: no text"; ended=1; continue; }
    cat "$folder/$what.txt"
    if cmp -s "$folder/cpu.txt" "$folder/$what.txt"; then
      echo "$what: the same text as on the CPU"
    else
      echo "$what: another text than on the CPU (near-ties may fall otherwise):"
      diff "$folder/cpu.txt" "$folder/$what.txt"
    fi
  done
  return $ended
}
layer() {
  local room
  room=$(df --output=avail -B1 "$folder" | tail -1)
  [ "$room" -gt 14000000000 ] || { echo "$folder has room for $room bytes, 14 GB are needed: left out"; return; }
  within 180 "$moemesh" bench make-checkpoint "$folder/v3-layer" --size v3-layer --dtype fp8 &&
    within 150 "$moemesh" bench device --device "$device" --model "$folder/v3-layer"
}
sanitizer() {
  local tool ended=0
  command -v compute-sanitizer >/dev/null || { echo "not found: left out"; return; }
  for tool in memcheck racecheck; do
    within 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$moemesh" bench device --device "$device" --small || ended=1
  done
  return $ended
}

section "checking expert kernels on $device" kernels
if grep -qe "no CUDA driver" -e "there is no cuda:" "$folder/checked"; then
  echo "no device"
  exit 2
fi
section "checking the trunk on $device" trunk
section "times" times
section "PyTorch and Triton" peers
section "the bundled model, experts and trunk on $device" bundled
section "one layer of DeepSeek-V3 on one node" layer
section "compute-sanitizer" sanitizer
[ -z "$failed" ] || { echo; echo "failed:$failed"; exit 1; }
