r"""Train the encoder on images whose overlaps are known, or on warped copies of any images, as a job on a Ray cluster.

    ray job submit --address http://HEAD:8265 --working-dir . \
        -- python ray_jobs/train.py --config configs/train/overlap.yaml images=/data/rooms cameras=/data/rooms \
           train.validation=/data/validation.txt train.workers=8 output=/data/run

Takes what `vop train` takes, config files included. Paths: URIs, or absolute on storage every node mounts.
The cluster needs the package and its `cpu` or `gpu` extra installed on every node.
"""

import sys

from vop.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "cluster.address=auto", *sys.argv[1:]]))
