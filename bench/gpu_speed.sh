#!/usr/bin/env bash
# Speed of the Llama-3.1-8B shape (random weights) on one GPU: one JSON document for each row, and the table of them.
#   bash bench/gpu_speed.sh OUT
#   ROWS="fp8-128-128 bf16-b1" REPEAT=1 REQUESTS=1024 bash bench/gpu_speed.sh OUT        a short run
# All rows of a precision share one process and one engine. bench/gpu_speed_rows.py lists the rows and what the environment changes;
# SHAPE (llama-3.1-8b), BENCH_OPTIONS (more options for every build), CAMSHAFT_CACHE (an earlier build's cache), CAMSHAFT_COMMIT
# (where there is no git), START_REPEAT (3). The start rows write the engine to disk: 9 GB for fp8, 16 GB for bf16, in WORK or TMPDIR.
set -euo pipefail
out=${1:?directory for the results}
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-$(mktemp -d)}
mkdir -p "$work"
[ -n "${WORK:-}" ] || trap 'rm -rf "$work"' EXIT
export CAMSHAFT_CACHE=${CAMSHAFT_CACHE:-$work/cache} PYTHONUNBUFFERED=1
rows() { python3 "$here/gpu_speed_rows.py" "$@"; }
bench() { python3 -m camshaft bench run "$@" --output "$out"; }

for precision in fp8 bf16; do
  names=$(rows "$precision" --names)
  [ -n "$names" ] || continue
  echo "== $precision: $names"
  engine=$work/engine-$precision save=()
  case " $names " in *" $precision-start "*) rm -rf "$engine"; save=(--save "$engine") ;; esac
  rows "$precision" > "$work/$precision.json"
  # shellcheck disable=SC2046,SC2086  # options are words
  bench --random-weights "${SHAPE:-llama-3.1-8b}" $(rows "$precision" --options) ${BENCH_OPTIONS:-} \
    "${save[@]}" --suite "$work/$precision.json"
  rm -f "$out/$precision-none.json"
  [ ${#save[@]} -gt 0 ] || continue
  for number in $(seq 1 "${START_REPEAT:-3}"); do
    rows "$precision" --start "$number" > "$work/start.json"
    # where packages cannot be written to, Python would compile their modules anew in every process
    PYTHONDONTWRITEBYTECODE='' PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$work/pycache} \
      bench "$engine" --suite "$work/start.json"
  done
  rm -rf "$engine"
done
python3 "$here/performance_table.py" "$out"/*.json
