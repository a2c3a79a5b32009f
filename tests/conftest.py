"""What every test file may ask for."""

import importlib.util
import os
from pathlib import Path

import pytest

# Before any test imports the libraries that read them: no telemetry, no fork warnings from the tokenizer's threads.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Eight emulated devices, for the tests of sharding; all others use the first. A test runs once what it compiles, on
# small models, and compiling is most of its time: LLVM is not to optimize, nor XLA to write its loops by way of MLIR,
# which takes as long again. XLA's own passes are those that users get.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Corpora, the real tokenizer and known answers, which stand beside the checkout and are not part of it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the shared data is not here: no folder {SHARED_DATA}")
    return SHARED_DATA


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the TPU compiler its tests are skipped before any of their fixtures asks for it."""
    if importlib.util.find_spec("libtpu") is None:
        absent = pytest.mark.skip(reason="no TPU compiler: the libtpu wheel is not installed")
        for item in items:
            if item.get_closest_marker("tpu_compiler"):
                item.add_marker(absent)


@pytest.fixture(autouse=True)
def _skip_what_is_absent(request: pytest.FixtureRequest) -> None:
    """Markers that name a need skip the test where that need is not met, and say so."""
    if request.node.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() not in ("gpu", "tpu"):
            pytest.skip(f"no accelerator: jax's backend is {jax.default_backend()!r}")
    if request.node.get_closest_marker("real_weights") and "OPTJAX_CHECKPOINTS" not in os.environ:
        pytest.skip("OPTJAX_CHECKPOINTS does not name a folder with Meta's checkpoints")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs do not outlive their file: together they would take more memory than the models."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture
def no_digits(monkeypatch):
    """int8 codes are multiplied in float32, as where XLA has no kernel for them; programs from before and of this are
    forgotten."""
    import jax

    monkeypatch.setattr("optjax.quantization.int8_on_cpu._multiplies_integers", lambda: False)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """Meta's real checkpoints, one folder per size (`opt-125m/`, `opt-350m/`, …), for tests marked `real_weights`."""
    return Path(os.environ["OPTJAX_CHECKPOINTS"])
