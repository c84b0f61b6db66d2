#!/usr/bin/env bash
# Both studies on a machine with many cores, in the background of what else it does; results in OUT/studies/studies.tar every 20 s:
#   setsid bash scripts/studies/both.sh CARRIED OUT MINUTES JOBS_OF_MOHAWK JOBS_OF_PTQ [more options of mohawk.py] >/dev/null 2>&1 &
# in the repository's root. CARRIED has the mohawk study's teacher.pt and tokenizer.json. Goes on with what is in /tmp/studies.
set -eu
carried=$1 out=$2 minutes=$3 jobs=$4 others=$5
shift 5
work=/tmp/studies
mkdir -p $work/code $work/mohawk
cp -rp qat tmexport runtime_ref zero_shot scripts $work/code/ # the checkout may be written again meanwhile
cp "$carried"/teacher.pt "$carried"/tokenizer.json $work/mohawk/
cd $work/code
export PYTHONPATH=$work/code:${PYTHONPATH:-} CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
pack() {
  mkdir -p "$out/studies"
  (cd $work && { lscpu; nproc; uptime; } >machine.txt 2>&1
    tar cf "$out/studies/.tar" --ignore-failed-read machine.txt ./*.log ./*.json mohawk/*.json mohawk/table.md mohawk/mohawk.png) 2>/dev/null || true
  mv "$out/studies/.tar" "$out/studies/studies.tar"
}
python3 -c 'from pathlib import Path
from scripts.demo.make_corpus import read_corpus, write_split
write_split(read_corpus(), Path("../train.jsonl"), Path("../heldout.jsonl"))' >$work/data.log 2>&1
head -n 3 ../heldout.jsonl >../three.jsonl
nice -n 5 python3 scripts/studies/mohawk.py --data ../train.jsonl --held-out ../heldout.jsonl --out ../mohawk --seeds 3 \
  --jobs "$jobs" --minutes "$minutes" "$@" >../mohawk.log 2>&1 &
nice -n 5 python3 scripts/studies/ptq_ablation.py --teacher scripts/demo/teacher --data ../train.jsonl --heldout ../three.jsonl \
  --samples 16 --seeds 3 --jobs "$others" --minutes "$minutes" --out ../ptq.json >../ptq.log 2>&1 &
while [ -n "$(jobs -r)" ]; do
  sleep 20
  pack
done
pack
