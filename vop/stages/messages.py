"""What a message to an actor costs the driver: the part of a search that no shard makes shorter."""

import time

import numpy as np
import ray

ACTORS, ROUNDS = 2, 40


class Idle:
    """An actor that answers at once."""

    def answer(self, batch: np.ndarray) -> int:
        """The length of what it was sent."""
        return len(batch)


def message_seconds(batch_bytes: int) -> float:
    """Seconds of the driver to ask an actor about a batch of so many bytes and to take its answer; the median round."""
    actors = [ray.remote(num_cpus=0)(Idle).remote() for _ in range(ACTORS)]
    batch, took = np.zeros(batch_bytes, np.uint8), []
    try:
        for _ in range(ROUNDS):
            reference = ray.put(batch)
            start = time.process_time()
            asked = [actor.answer.remote(reference) for actor in actors]
            ray.wait(asked, num_returns=len(asked), timeout=60)
            for one in asked:
                ray.get(one, timeout=60)
            took.append(time.process_time() - start)
    finally:
        for actor in actors:
            ray.kill(actor)
    return float(np.median(took)) / ACTORS
