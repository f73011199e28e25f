r"""Make a COLMAP model, or several, of a collection, as a job on a Ray cluster.

    ray job submit --address http://HEAD:8265 --working-dir . \
        -- python ray_jobs/reconstruct.py images=/data/photos output=/data/run

Takes what `vop reconstruct` takes, config files included. Paths: URIs, or absolute on storage every node mounts.
`python` is that of the environment on the nodes that has the package and its `cpu` or `gpu` extra. `vop submit` wraps
this. The last lines are status, result and reason; `vop --help` lists what the exit code means.
"""

import sys

from vop.cli import main

if __name__ == "__main__":
    sys.exit(main(["reconstruct", "cluster.address=auto", *sys.argv[1:]]))
