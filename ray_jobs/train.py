r"""Train the encoder on images whose overlaps are known, or on warped copies of any images, as a job on a Ray cluster.

    ray job submit --address http://HEAD:8265 --working-dir . \
        -- python ray_jobs/train.py --config configs/train/overlap.yaml images=/data/rooms cameras=/data/rooms \
           train.validation=/data/validation.txt train.workers=8 output=/data/run

Takes what `vop train` takes, config files included. Paths: URIs, or absolute on storage every node mounts.
`python` is that of the environment on the nodes that has the package and its `cpu` or `gpu` extra. `vop submit` wraps
this. The last lines are status, result and reason; `vop --help` lists what the exit code means.
"""

import sys

from vop.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "cluster.address=auto", *sys.argv[1:]]))
