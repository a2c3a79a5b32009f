"""What pyproject.toml says of the checkout: no package, asset or dependency is forgotten."""

import re
import tomllib
from importlib import import_module

import pytest
from source import FOLDERS, REPOSITORY, Module, imports, is_third_party, modules

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def requirement(line: str) -> str:
    """The import name of a dependency: `orbax-checkpoint>=0.11` is imported as orbax."""
    name = re.split(r"[\[<>=~! ]", line)[0].lower().replace("-", "_")
    return {"orbax_checkpoint": "orbax", "tensorboardx": "tensorboardX"}.get(name, name)


def test_every_package_is_listed():
    """Setuptools does not discover packages under a mapping, and would leave a new one out of the wheel silently."""
    packages = {module.package for module in modules()}
    assert packages == set(SETUPTOOLS["packages"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_with_code_is_a_package(folder: str):
    for path in (REPOSITORY / folder).rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has code and no __init__.py"


def test_every_package_is_mapped_to_its_folder():
    mapping = SETUPTOOLS["package-dir"]
    for module in modules():
        if module.path.name == "__init__.py":
            package, below = module.package, ""
            while package not in mapping:
                package, _, last = package.rpartition(".")
                below = f"/{last}{below}"
            assert (REPOSITORY / f"{mapping[package]}{below}").samefile(module.path.parent)


def test_every_asset_is_packaged():
    patterns = SETUPTOOLS["package-data"]["optjax"]
    packaged = {path for pattern in patterns for path in (REPOSITORY / "optjax").glob(pattern)}
    assert REPOSITORY / "optjax" / "py.typed" in packaged
    others = {p for p in (REPOSITORY / "optjax").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others <= packaged, f"not in the wheel: {sorted(map(str, others - packaged))}"
    assert sum(path.stat().st_size for path in packaged if path.is_file()) <= 20 * 2**20


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_every_dependency_is_declared(module: Module):
    """optjax/ and sharding/ need the core alone, train/ `train` as well; reading tables, pictures, trackers: extras."""
    extras = PROJECT["project"]["optional-dependencies"]
    allowed = {requirement(line) for line in PROJECT["project"]["dependencies"]}
    if module.name.startswith("optjax.train"):
        allowed |= {requirement(line) for line in extras["train"]}
    more = {
        "optjax.sharding.plan.plot": ["plot"],
        "optjax.train.report": ["plot"],
        "optjax.train.tracking": ["tensorboard", "wandb"],
    }
    more |= dict.fromkeys([module.name] if module.name.startswith("optjax.train.data.") else [], ["data"])
    for extra in more.get(module.name, []):
        allowed |= {requirement(line) for line in extras[extra]}
    for found in imports(module.path.read_text(encoding="utf-8"), module.package):
        assert not is_third_party(found.top) or found.top in allowed, (
            f"{module.path.relative_to(REPOSITORY)}:{found.line} imports {found.top}; declare it in pyproject.toml"
        )


def test_the_version_is_one():
    assert import_module("optjax").__version__ == PROJECT["project"]["version"]


def test_the_command_is_there():
    module, _, function = PROJECT["project"]["scripts"]["optjax"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_tested_versions_are_within_the_declared_ranges():
    from packaging.requirements import Requirement

    lines = PROJECT["project"]["dependencies"] + sum(PROJECT["project"]["optional-dependencies"].values(), [])
    tested = {}
    for line in (REPOSITORY / ".ci" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            tested[name.replace("_", "-")] = version
    for line in lines:
        wanted = Requirement(line)
        version = tested.get(wanted.name.replace("_", "-"))
        assert version is None or wanted.specifier.contains(version), f"{line}, but {version} is tested"
