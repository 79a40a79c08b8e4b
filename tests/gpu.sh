#!/usr/bin/env bash
# Builds, checks and times everything that needs a GPU, in one call on a machine that has one:
#   every kernel against the reference in double, over poisoned memory, rows alone bit for bit
#   the same under compute-sanitizer, if it is there
#   times beside the device's copy and matmul rates, and beside PyTorch where python3 has it
#   one layer of DeepSeek-V3, 256 experts of 11.4 GB in all, resident on one node: its round trips through gRPC, broken down
#   the bundled model with its experts, its trunk, and both on cuda:0: greedy text beside the CPU's
# Needs a Rust toolchain, or target/release/moemesh built elsewhere. Says "no device" and ends with 2 where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda:0}
say() { printf '\n== %s\n' "$*"; }

if command -v cargo >/dev/null; then
  say "building"
  cargo build --release --locked
fi
moemesh=target/release/moemesh
[ -x "$moemesh" ] || { echo "no $moemesh and no cargo to build it" >&2; exit 1; }

say "checking kernels on $device"
if ! out=$("$moemesh" bench device --device "$device" --check 2>&1); then
  echo "$out"
  case $out in *"no CUDA driver"* | *"there is no cuda:"*) echo "no device"; exit 2 ;; esac
  exit 1
fi
echo "$out"

say "compute-sanitizer"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$moemesh" bench device --device "$device" --check
  done
else
  echo "not found: left out"
fi

say "times"
folder=$(mktemp -d)
mesh=
trap '[ -z "$mesh" ] || kill "$mesh"; rm -rf "$folder"' EXIT
"$moemesh" bench device --device "$device" --lines "$folder/ours.jsonl"

say "PyTorch"
if python3 -c "import torch" 2>/dev/null; then
  python3 tests/peers/grouped_ffn.py --device "$device" --beside "$folder/ours.jsonl" || echo "failed: not measured"
else
  echo "python3 has no torch: left out"
fi

say "one layer of DeepSeek-V3 on one node"
room=$(df --output=avail -B1 "$folder" | tail -1)
if [ "$room" -gt 14000000000 ]; then
  "$moemesh" bench make-checkpoint "$folder/v3-layer" --size v3-layer --dtype fp8
  "$moemesh" bench device --device "$device" --model "$folder/v3-layer"
  rm -rf "$folder/v3-layer"
else
  echo "$folder has room for $room bytes, 14 GB are needed: left out"
fi

say "the bundled model, experts and trunk on $device"
generate() { # FILE of configuration
  local port=$((20000 + RANDOM % 20000))
  "$moemesh" up --no-demo --expert-nodes 1 --http "127.0.0.1:$port" --config "$1" >"$folder/log" 2>&1 &
  mesh=$!
  for _ in $(seq 300); do
    kill -0 "$mesh" 2>/dev/null || { cat "$folder/log" >&2; mesh=; return 1; }
    if "$moemesh" generate "Once upon a time" --max-tokens 64 --url "http://127.0.0.1:$port" 2>"$folder/error"; then
      kill "$mesh"; wait "$mesh" || true; mesh=
      return 0
    fi
    sleep 0.2
  done
  cat "$folder/log" "$folder/error" >&2
  return 1
}
experts=$(printf '[expert-node]\ndevice = "%s"\ndevice_memory = 1073741824\n' "$device")
: >"$folder/cpu.toml"
printf '[router]\nexpert_device = "cuda"\n%s\n' "$experts" >"$folder/experts.toml"
printf '[router]\ndevice = "%s"\n' "$device" >"$folder/trunk.toml"
printf '[router]\ndevice = "%s"\nexpert_device = "cuda"\n%s\n' "$device" "$experts" >"$folder/both.toml"
generate "$folder/cpu.toml" >"$folder/cpu.txt"
for what in experts trunk both; do
  generate "$folder/$what.toml" >"$folder/$what.txt"
  cat "$folder/$what.txt"
  if cmp -s "$folder/cpu.txt" "$folder/$what.txt"; then
    echo "$what: the same text as on the CPU"
  else
    echo "$what: another text than on the CPU (near-ties may fall otherwise):"
    diff "$folder/cpu.txt" "$folder/$what.txt" || true
  fi
done
