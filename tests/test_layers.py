"""The layers of the package, read from its syntax trees: who may import whom, and where Ray may stand."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"schema", "config", "files", "storage", "exit_codes"},
    {"image", "geometry", "metrics", "pairs", "quantised", "store", "hdf5", "catalog", "parts", "run", "progress"}
    | {"lock", "journal", "summary"}
    | {"cameras", "names", "pickled", "foreign_hdf5", "foreign_hloc", "shards", "features", "matches", "hloc"}
    | {"lift", "colmap"},
    {"models", "retrieval", "datasets", "viz", "embedding", "evaluation", "matching", "extraction", "pair_matching"}
    | {"pose", "pose_estimation", "pair_verification", "view_graph", "reconstruction", "point_colors"}
    | {"localization", "map_points", "query_cameras", "triangulation", "training", "planning"},
    {"stages"},
    {"steps"},
    {"pipeline"},
    {"vop", "cli", "ray_jobs"},  # "vop" is the package itself: the Python entry
)
SHARED_STAGES = ("vop.stages.cluster", "vop.stages.watch")  # connection and metrics; stages know no other stage


def layer(module: str) -> int:
    """Layer of a dotted module name; raises KeyError for a module that no layer names."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "vop" and len(parts) > 1 else parts[0]
    return {member: level for level, members in enumerate(LAYERS) for member in members}[name]


def imported(tree: ast.AST, modules: set[str]):
    """(dotted name, is relative) of every import, at any depth; `from package import module` names the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in modules else node.module or ""), node.level > 0


def violations(module: str, source: str, modules: set[str]) -> list[str]:
    """What a module imports against the rules; `modules` are the dotted names of the whole package."""
    try:
        own = layer(module)
    except KeyError:
        return [f"{module} is in no layer: assign it in LAYERS"]
    found = []
    for name, relative in imported(ast.parse(source), modules):
        top = name.split(".")[0]
        if relative:
            found.append(f"{module}: relative import of {name}")
        elif top == "ray" and not module.startswith("vop.stages."):
            found.append(f"{module}: imports ray outside vop/stages")
        elif top in ("vop", "ray_jobs") and name in modules and layer(name) > own:
            found.append(f"{module}: imports {name} of a higher layer")
        elif module.startswith("vop.stages.") and name.startswith("vop.stages") and name not in SHARED_STAGES:
            found.append(f"{module}: imports the stage {name}")
    return found


def package() -> dict[str, str]:
    """Source of every module of vop and of the cluster jobs, by dotted name."""
    sources = {}
    for path in [*ROOT.glob("vop/**/*.py"), *ROOT.glob("ray_jobs/**/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def test_every_module_keeps_to_its_layer():
    sources = package()
    assert {"vop", "vop.config", "vop.stages.embed", "vop.retrieval.voting"} <= set(sources)
    assert [line for module, source in sources.items() for line in violations(module, source, set(sources))] == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("vop.image", "from vop.models import encoder", "vop.models.encoder of a higher layer"),
        ("vop.image", "from vop import pipeline", "vop.pipeline of a higher layer"),
        ("vop.image", "import vop.stages.embed", "vop.stages.embed of a higher layer"),
        ("vop.retrieval.voting", "from vop import embed", "imports vop of a higher layer"),
        ("vop.retrieval.voting", "def f():\n    import ray", "ray outside"),
        ("vop.models.encoder", "from ray.data import Dataset", "ray outside"),
        ("ray_jobs.register", "import ray", "ray outside"),
        ("vop.stages.embed", "from vop.stages.search import Shards", "the stage vop.stages.search"),
        ("vop.stages.embed", "from vop.stages import search", "the stage vop.stages.search"),
        ("vop.pipeline", "from .store import EmbeddingStore", "relative import"),
        ("vop.helpers", "", "in no layer"),
    ],
)
def test_a_planted_violation_is_found(module, source, complaint):
    found = violations(module, source, set(package()) | {"ray_jobs.register", "vop.helpers"})
    assert len(found) == 1
    assert complaint in found[0]


def test_what_is_allowed_passes():
    allowed = "import ray\nimport numpy\nfrom vop.config import Config\nfrom vop.stages import cluster\n"
    assert violations("vop.stages.embed", allowed, set(package())) == []
