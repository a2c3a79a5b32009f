"""Imports go one way, and importing optjax costs little more than importing jax."""

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from source import REPOSITORY, Import, Module, imports, is_third_party, modules

MODULES = modules()
# What `import optjax` may load of other people's code: all else is imported by the function that needs it.
LIGHT = {"jax", "jaxlib", "ml_dtypes", "numpy"}
HEAVY = ["flax", "h5py", "huggingface_hub", "matplotlib", "msgpack", "optax", "orbax", "rich", "safetensors"]
HEAVY += ["tokenizers", "torch", "tqdm", "transformers"]


def imports_of(module: Module) -> list[Import]:
    return list(imports(module.path.read_text(encoding="utf-8"), module.package))


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def targets(found: Import) -> list[str]:
    """`from optjax import train` may name a module as well as a function."""
    return [found.module, f"{found.module}.{found.name}"] if found.name else [found.module]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_imports_go_one_way(module: Module):
    for found in imports_of(module):
        for target in targets(found):
            where = f"{module.path.relative_to(REPOSITORY)}:{found.line} imports {target}"
            if is_in(module.name, "optjax.sharding"):
                assert not is_in(target, "optjax.train"), f"{where}: sharding may import optjax only"
            elif not is_in(module.name, "optjax.train"):
                assert not is_in(target, "optjax.train"), f"{where}: optjax imports nothing of train"
                assert found.lazy or not is_in(target, "optjax.sharding"), (
                    f"{where}: optjax stands alone on one device; import sharding where a mesh is given"
                )
            assert found.top not in ("sharding", "train"), f"{where}: its installed name is optjax.{found.top}"


@pytest.mark.parametrize(
    "module", [m for m in MODULES if not is_in(m.name, "optjax.train")], ids=lambda module: module.name
)
def test_heavy_imports_are_lazy(module: Module):
    for found in imports_of(module):
        assert found.lazy or not is_third_party(found.top) or found.top in LIGHT, (
            f"{module.path.relative_to(REPOSITORY)}:{found.line} imports {found.module} when it is itself imported; "
            "import it inside the function that needs it"
        )


@pytest.mark.parametrize("use", ["import optjax", "import optjax; optjax.generate", "import optjax.sharding"])
def test_import_loads_nothing_heavy(use: str):
    program = f"import sys; {use}; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names_exist():
    for name in PUBLIC:
        module = import_module(name)
        public = getattr(module, "__all__", [])
        assert len(set(public)) == len(public), f"{name}.__all__ repeats a name"
        for attribute in public:
            assert hasattr(module, attribute), f"{name}.__all__ names {attribute}, which is not there"


# Notebooks and benchmarks show what users can do, so they use what users can use.


def programs() -> Iterator[tuple[str, str]]:
    """Each Python program in colab/ and bench/ and the code of each notebook, with its path."""
    for folder in ("colab", "bench"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix == ".py":
                yield str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8")
            elif path.suffix == ".ipynb" and ".ipynb_checkpoints" not in path.parts:
                cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
                code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
                lines = ("pass" if line.lstrip()[:1] in ("!", "%") else line for line in code.split("\n"))
                yield str(path.relative_to(REPOSITORY)), "\n".join(lines)


def private_uses(text: str) -> list[str]:
    """The parts of optjax that a program uses and that are not public."""
    public = {name: set(getattr(import_module(name), "__all__", [])) for name in PUBLIC}
    found = []
    names = {}  # a name in the program -> the public module it stands for
    for used in imports(text):
        if used.top != "optjax":
            continue
        if used.module not in public:
            found.append(used.module)
        elif used.name is None:
            names["optjax"] = "optjax"
        elif f"{used.module}.{used.name}" in public:
            names[used.name] = f"{used.module}.{used.name}"
        elif used.name not in public[used.module]:
            found.append(f"{used.module}.{used.name}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname and alias.name in public}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            base = ast.unparse(node.value)
            top, _, rest = base.partition(".")
            module = names.get(top, "") + (f".{rest}" if rest else "")
            if module in public and f"{module}.{node.attr}" not in public and node.attr not in public[module]:
                found.append(f"{module}.{node.attr}")
    return [use for use in found if use != "optjax.__version__"]


PUBLIC = ("optjax", "optjax.sharding", "optjax.sharding.plan", "optjax.train", "optjax.train.data")


# Attention alone is no public function, nor is the training loop; both are measured alone all the same.
INNER = {"bench/attentions.py", "bench/train_loop.py", "bench/train_sides.py"}


@pytest.mark.parametrize(("path", "text"), [pytest.param(*program, id=program[0]) for program in programs()])
def test_programs_use_the_public_api(path: str, text: str):
    assert (private_uses(text) == []) != (path in INNER), f"{path} uses what is not in __all__, or no longer does"


def test_private_uses_are_seen():
    program = """
        import optjax, optjax.train, optjax.cache
        import optjax as o
        from optjax import forward, sharding, secret
        from optjax.model import forward
        def f():
            optjax.forward(1); optjax.config.x; o.hidden(); o.forward(); sharding.nothing; optjax.train.nothing()
            optjax.__version__
    """
    assert set(private_uses(textwrap.dedent(program))) == {
        "optjax.cache", "optjax.secret", "optjax.model", "optjax.config", "optjax.hidden", "optjax.sharding.nothing",
        "optjax.train.nothing",
    }  # fmt: skip


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path):
    text = textwrap.dedent("""
        import a.b
        from . import c
        from ..d import e
        if TYPE_CHECKING:
            import f
        def g():
            from h import i
        class J:
            import k
    """)
    seen = {(found.module, found.name, found.lazy) for found in imports(text, "optjax.x.y")}
    assert seen == {
        ("a.b", None, False), ("optjax.x.y", "c", False), ("optjax.x.d", "e", False), ("f", None, True),
        ("h", "i", True), ("k", None, False),
    }  # fmt: skip


def test_no_public_name_is_a_module_too():
    """`optjax.score` would be the function or the module, by what was imported first."""
    import optjax
    from optjax._api import __all__

    taken = {path.stem for path in Path(optjax.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not taken & set(__all__)
