"""The house: who may import whom, from the AST; optional packages stay lazy; importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room -> the rooms of ditfast it may import; the top-level modules (train, sample, cli, ...) may import all.
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "layers": {"kernels"},
    "diffusion": {"kernels"},
    "distributed": {"kernels", "layers"},
    "data": set(),
    "evaluation": set(),
    "reference": set(),
}
OPTIONAL = {
    "diffusers",
    "flash_attn",
    "flash_attn_interface",
    "xformers",
    "torchdiffeq",
    "apex",
    "amp_C",
    "liger_kernel",
    "transformer_engine",
    "pynvml",
}
SOURCES = sorted((ROOT / "ditfast").rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute dotted names that a module imports; relative ones resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "ditfast").with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    own = room(path)
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("bench", "tests"), name
        if parts[0] == "ditfast" and own in ARROWS and len(parts) > 1 and parts[1] != own:
            assert parts[1] in ARROWS[own], f"{own} may not import {name}"


def test_the_arrows_are_read(tmp_path):
    """The reader sees absolute, relative and nested imports; without this the test above could pass on nothing."""
    module = ROOT / "ditfast" / "kernels" / "adaln_modulate.py"
    assert any(name.startswith("ditfast.kernels._op") for name in imports(module))
    assert "torch" in imports(module)
    assert {"kernels", "layers", "diffusion", "data", "distributed"} <= {room(p) for p in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_lazily(path):
    heavy = OPTIONAL | {"sklearn", "matplotlib", "tensorboard"}
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & heavy


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_ditfast_imports_nothing():
    assert run("import sys, ditfast; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])") == "[]\n"


def test_importing_the_kernels_is_quick():
    code = "import time, torch; start = time.process_time(); import ditfast.kernels; print(time.process_time() - start)"
    assert float(run(code)) < 2


def test_public_names_load():
    names = run("import ditfast; print([n for n in ditfast.__all__ if getattr(ditfast, n) is None])")
    assert names == "[]\n"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"no attribute 'DiTT'; it has .*DiT_models"):
        import ditfast

        ditfast.DiTT  # noqa: B018


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_functions_are_short():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                length = node.end_lineno - node.lineno + 1
                long += [f"{path.name}:{node.name} {length}"] if length > 60 else []
    assert long == []
