"""What things cost, and what a cut brings in time, beside the peers; with tables and pictures.

    python benchmarks [--only passes masks_of_vit_b …] [--rounds 7] [--threads 2]
    python benchmarks --only accuracy  # takes many hours, so it is not among the others; see accuracy.py
    python benchmarks --only targets  # some 20 minutes; needs CIFAR-10, too
    python benchmarks --only latency --threads 1  # some 15 minutes; needs CIFAR-10 and onnxruntime
    python benchmarks --only foundation  # minutes on a GPU, many hours on two cores; see foundation.py
    python benchmarks --only twice  # some 15 minutes; CIFAR-10
    python benchmarks --only deep --rounds 3  # an hour, three seeds; CIFAR-10
    python benchmarks --only rows --threads 1  # some 5 minutes; needs CIFAR-10 and onnxruntime
    python benchmarks --only runtimes --threads 1  # some 30 minutes; needs CIFAR-10, onnxruntime and OpenVINO
    python benchmarks --only elsewhere --threads 1  # some 10 minutes; needs CIFAR-10 and what elsewhere.py names
    python benchmarks --only runtimes_of_vit_s --threads 1  # some 30 minutes; DINOv2, Caltech-101, both
    python benchmarks --only predicted --threads 1  # some 10 minutes; DINOv2 and Caltech-101
    python benchmarks --only weighted weighted_features  # some 20 minutes; the second needs these, too:
    python benchmarks --only steps --rounds 3  # some 15 minutes; needs Caltech-101 and weights of DINOv2

Everything that is compared runs interleaved in one process, in a new random order each round, and ratios are taken
within rounds: medians and quartiles. Images and labels are random; so are the weights of timm's models, while those of
the small ones are the committed checkpoints.
"""

import argparse
import os

import accuracy
import deep
import deployed
import elsewhere
import foundation
import methods
import peers
import predicted
import speed
import steps
import targets
import torch
import weighted

USUAL = methods.CASES | peers.CASES | speed.CASES
CASES = USUAL | accuracy.CASES | targets.CASES | steps.CASES | foundation.CASES | weighted.CASES
CASES |= predicted.CASES | deep.CASES | deployed.CASES | elsewhere.CASES


def main():
    parser = argparse.ArgumentParser(
        prog="python benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CASES,
        default=list(USUAL),
        metavar="CASE",
        help=", ".join(CASES),
    )
    parser.add_argument("--out", help="folder for tables and pictures (figures/bench)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["VITLAB_HEADLESS"] = "1"  # no bars
    os.environ["BENCH_OUT"] = options.out or ""
    for case in options.only:
        CASES[case](options.rounds)


if __name__ == "__main__":
    main()
