"""optjax: OPT as pure JAX functions over parameter pytrees.

The public names stand in `optjax._api`, which is imported when the first of them is used: jax takes a second to import,
and ``optjax --help`` does not need it.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from optjax._api import *  # noqa: F403
    from optjax._api import __all__  # noqa: F401
else:

    def __getattr__(name: str) -> Any:
        from importlib import import_module
        from importlib.util import find_spec

        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module 'optjax' has no attribute {name!r}")
        if find_spec(f"optjax.{name}") is not None:
            return import_module(f"optjax.{name}")
        api = import_module("optjax._api")
        globals().update({each: getattr(api, each) for each in api.__all__}, __all__=api.__all__)
        if name not in globals():
            raise AttributeError(f"module 'optjax' has no attribute {name!r}")
        return globals()[name]


def __dir__() -> list[str]:
    import optjax._api

    return sorted({*globals(), *optjax._api.__all__})
