#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.15.0: torchrun's processes on a machine without an accelerator.
#
# A good guess: under `torchrun --nproc-per-node 2`, `Accelerator()` joins the two processes, on GPUs by
# nccl and on CPUs by gloo, since torchrun has put RANK, WORLD_SIZE and MASTER_ADDR into the environment.
#
# What happens on CPUs: `Accelerator()` counts one process. Each of the two takes itself for the main one,
# trains alone and writes the same files, and `gather_object` returns the caller's own value only. Nothing
# is said. `Accelerator(cpu=True)` does join them, but only where it is the first in the process: after an
# `Accelerator()`, such as one made to ask for `.device`, it still counts one.
#
# Seen: plain: 1 process, gathered [0] and [1]. cpu=True after it: the same.
#       cpu=True first: 2 processes, gathered [0, 1] in both.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.15.0 accelerate==1.15.0

cat > joined.py <<'PYTHON'
import os
import sys

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed

rank = int(os.environ["RANK"])
for way in sys.argv[1:]:
    state = Accelerator(cpu=True) if way == "cpu" else Accelerator()
    gathered = gather_object([rank])
    # One write for each line, so that the lines of two processes do not mix.
    line = f"rank {rank}, {way}: {state.num_processes} {state.is_main_process} {gathered}\n"
    os.write(1, line.encode())
if distributed.is_initialized():
    distributed.destroy_process_group()
PYTHON

together() {
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --standalone \
        --nproc-per-node 2 joined.py "$@" 2>/dev/null | sort
}

alone=$(together plain cpu)
joined=$(together cpu)
echo "$alone"
echo "--"
echo "$joined"

[ "$alone" = "rank 0, cpu: 1 True [0]
rank 0, plain: 1 True [0]
rank 1, cpu: 1 True [1]
rank 1, plain: 1 True [1]" ] || { echo "changed: Accelerator() on CPUs under torchrun"; exit 1; }
[ "$joined" = "rank 0, cpu: 2 True [0, 1]
rank 1, cpu: 2 False [0, 1]" ] || { echo "changed: Accelerator(cpu=True) on CPUs under torchrun"; exit 1; }
