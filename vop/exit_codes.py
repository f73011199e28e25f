"""Exit codes: how a command ended, for the scripts and schedulers that decide what to do next."""

import re

DONE, FAILED, IMPOSSIBLE, UNUSABLE, IN_USE, CLUSTER, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

MEANINGS = {
    DONE: "done",
    FAILED: "failed unexpectedly",
    IMPOSSIBLE: "told something impossible: correct the command",
    UNUSABLE: "the input or a store cannot be used: look at the data",
    IN_USE: "the output is in use by another run: wait for it, or give another output",
    CLUSTER: "the cluster or the storage failed: the same command goes on where it stopped",
    INTERRUPTED: "interrupted: the same command goes on where it stopped",
}

# By name, so that nothing has to be imported to be looked up; the most special class of an error counts. Modules of vop
# raise ValueErrors, their own kinds among them, for what they cannot read.
CODES = {
    "vop.schema.bounds.ConfigError": IMPOSSIBLE,
    "vop.stages.search.NoRoomError": IMPOSSIBLE,
    "builtins.ImportError": IMPOSSIBLE,
    "builtins.ValueError": UNUSABLE,
    "builtins.FileNotFoundError": UNUSABLE,
    "builtins.NotADirectoryError": UNUSABLE,
    "builtins.IsADirectoryError": UNUSABLE,
    "builtins.PermissionError": UNUSABLE,
    "vop.catalog.TooManyBadImagesError": UNUSABLE,
    "vop.lock.LockedError": IN_USE,
    "vop.storage.StorageError": CLUSTER,
    "builtins.OSError": CLUSTER,
    "builtins.MemoryError": CLUSTER,
    "ray.exceptions.RayError": CLUSTER,
    "ray.data.exceptions.ExecutionTimeoutError": CLUSTER,
    "builtins.KeyboardInterrupt": INTERRUPTED,
}
# Errors around others: what stands inside decides, and where nothing known does, the innermost of these.
AROUND = {
    "vop.stages.search.SearchError": CLUSTER,
    "ray.exceptions.RayTaskError": FAILED,
    "ray.exceptions.UserCodeException": FAILED,
    "ray.data.exceptions.SystemException": FAILED,
    "ray.train.TrainingFailedError": CLUSTER,
}
ADVICE = re.compile(r"(?:\n|: ')Failed to apply UDF transform")


def exit_code(error: BaseException) -> int:
    """The code of a command that ended with an error."""
    around, inner = None, error
    while inner is not None:
        names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(inner).__mro__]
        known = next((name for name in names if name in CODES or name in AROUND), None)
        if known in CODES:
            return CODES[known]
        around = AROUND.get(known, around)
        inner = getattr(inner, "cause", None) or inner.__cause__
    return FAILED if around is None else around


def reason(error: BaseException) -> str:
    """What an error says, without the trace that Ray puts around one of a worker, and its advice on retries."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, BaseException):
        return reason(inner)
    return ADVICE.split(str(error))[0].strip() or type(error).__name__


def described(code: int) -> str:
    """`3, the input or a store cannot be used: look at the data`; of an unknown code the number alone."""
    return f"{code}, {MEANINGS[code]}" if code in MEANINGS else str(code)
