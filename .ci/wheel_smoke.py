"""Run by .ci/wheel outside the checkout, in a venv that holds the built wheel: is it all there, and nothing else?"""

import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

dist = Path(sys.argv[1])
[wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")

names = zipfile.ZipFile(wheel).namelist()
tops = {name.split("/")[0] for name in names}
assert all(top == "optjax" or top.endswith(".dist-info") for top in tops), (
    f"the wheel installs more than optjax: {tops}"
)
for expected in ("optjax/py.typed", "optjax/sharding/__init__.py", "optjax/train/__init__.py"):
    assert expected in names, f"{expected} is not in the wheel"
assert "optjax/sharding/plan/gpus/h100.txtpb" in names, "the wheel lacks what the GPU compiler is told of a GPU"
for file in ("config.json", "model.safetensors", "tokenizer.json"):
    assert f"optjax/assets/opt-mini/{file}" in names, f"opt-mini's {file} is not in the wheel"
with tarfile.open(sdist) as archive:
    assert any(name.endswith("/sharding/__init__.py") for name in archive.getnames()), "the sdist lacks sharding/"

environment = Path(sys.prefix).resolve()
packages = ("optjax", "optjax.checkpoints", "optjax.cli", "optjax.generation", "optjax.sharding", "optjax.train")
for name in (*packages, "optjax.sharding.plan"):
    file = import_module(name).__file__
    assert file and environment in Path(file).resolve().parents, f"{name} was imported from {file}, not from the wheel"
for name in ("sharding", "train", "tests"):
    try:
        import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"the wheel put a top-level {name} into site-packages")

import optjax  # noqa: E402

params, tokenizer = optjax.load("opt-mini")
ids = optjax.generate(params, *tokenizer("The old house"), max_new_tokens=8)
print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 2**20:.1f} MiB; from the wheel:")
print(tokenizer.decode(ids[0].tolist()))
