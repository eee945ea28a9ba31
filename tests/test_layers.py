"""Imports point one way, and the lower layers import no torch: see the layout in the README."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "mgpo_trl"

LAYERS = {  # a module imports from its own package or from lower layers only
    "vllm_server": 0, "vllm_rollout": 2,
    "boxes": 0, "geometry": 0, "images": 0, "prompts": 0, "answers": 0, "records": 0, "loss_utils": 0, "samplers": 0,
    "points": 0, "layouts": 0,
    "image_loading": 0, "packing": 0,
    "rollout": 1, "rewards": 1, "data": 1, "viewer": 1, "processing": 1, "adapters": 1,
    "launch_checks": 1, "vision_features": 1, "out_of_memory": 1, "hub": 1,
    "gallery": 2,
    "round_options": 2, "rollout_metrics": 2, "conversation": 2, "generation": 2, "mgpo_config": 2, "model_card": 2,
    "shared_prefix": 2, "scoring": 2,
    "watching": 3, "checkpoints": 3, "mgpo_trainer": 3, "memory": 3, "evaluation": 3, "merging": 3,
    "builtin": 4,
    "scripts": 5, "inference": 5, "push": 5,
    "integrations": 6,
    "preflight": 6,
    "builtin.run": 6, "builtin.__main__": 6,  # the command of the built-in task, as train.py and eval.py are
    "answer_picture": 1, "demo": 6, "cli": 7,
}  # fmt: skip
SIBLINGS = {
    ("image_loading", "images"),
    ("points", "boxes"),
    ("mgpo_config", "round_options"),
    ("model_card", "conversation"),
    ("mgpo_trainer", "watching"),
    ("mgpo_trainer", "checkpoints"),
    ("builtin.__main__", "builtin.run"),
}
"""Pairs inside one layer, in the only direction that they go."""
NO_TORCH = [
    "answer_picture",
    "cli",
    "boxes",
    "geometry",
    "images",
    "prompts",
    "answers",
    "records",
    "rollout",
    "rewards",
    "viewer",
    "data",
    "image_loading",
    "launch_checks",
    "out_of_memory",
]
NO_TORCH += ["processing", "adapters", "layouts", "rollout_metrics", "round_options", "conversation", "evaluation"]
NO_TORCH += ["gallery", "scripts", "hub", "model_card", "push", "watching", "cli"]


def key_of(module):
    """The longest name in `LAYERS` that `builtin.run` or `data.schema` begins with."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in LAYERS), names[-1])


def module_of(path):
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def imported(node, package):
    """Names below `mgpo_trl` that an import statement in `package` (a tuple of names) asks for."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = ["mgpo_trl", *package][: len(package) + 2 - node.level] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        names = [f"{module}.{alias.name}" for alias in node.names]
    else:
        names = []
    return {name.removeprefix("mgpo_trl.") for name in names if name.startswith("mgpo_trl.")}


def imports_of(path):
    """Everything of ours that a file imports, at its top or inside a function."""
    package = path.relative_to(SRC).parent.parts
    public = {"MGPOTrainer": "mgpo_trainer", "MGPOConfig": "mgpo_config"}
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    keys = {key_of(public.get(name, name)) for node in nodes for name in imported(node, package)}
    return keys - {"__version__"}


FILES = sorted(path for path in SRC.rglob("*.py") if path != SRC / "__init__.py")


def test_every_module_has_a_layer():
    assert {key_of(module_of(path)) for path in FILES} <= set(LAYERS)


def test_imports_are_found():
    """The check would pass on files that it can not read: these it must see."""
    assert {"boxes", "processing", "rollout"} <= imports_of(SRC / "conversation.py")
    assert {"conversation", "evaluation", "scripts", "builtin"} <= imports_of(SRC / "builtin" / "run.py")
    assert imported(ast.parse("from . import boxes").body[0], ()) == {"boxes"}
    assert imported(ast.parse("from ..data.schema import x").body[0], ("builtin",)) == {"data.schema.x"}
    assert imported(ast.parse("from .loading import x").body[0], ("data",)) == {"data.loading.x"}
    assert imported(ast.parse("import mgpo_trl.rollout, os").body[0], ()) == {"rollout"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_one_way(path):
    mine = key_of(module_of(path))
    for other in imports_of(path) - {mine}:
        lower = LAYERS[other] < LAYERS[mine] or (mine, other) in SIBLINGS
        assert lower, f"{path.relative_to(SRC)} (layer {LAYERS[mine]}) imports {other} (layer {LAYERS[other]})"


def test_importing_the_lower_layers_starts_no_torch():
    code = "; ".join(f"import mgpo_trl.{name}" for name in NO_TORCH)
    code += "; import sys; heavy = {'torch', 'transformers', 'trl'} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SRC.parent)}
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_prints_and_writes_nothing(tmp_path):
    code = "import mgpo_trl; mgpo_trl.__version__; import sys; assert 'torch' not in sys.modules"
    environment = {"PYTHONPATH": str(SRC.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_public_names():
    import mgpo_trl

    assert mgpo_trl.__all__ == ["GroundedVQA", "MGPOConfig", "MGPOTrainer"]
    assert mgpo_trl.MGPOConfig.__module__ == "mgpo_trl.mgpo_config"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mgpo_trl.nothing  # noqa: B018
