"""Text from a model: `generate` and `stream`, and `prefill` and `decode_step` for loops of one's own."""

from optjax.generation.api import GenerateOutput, generate, stream
from optjax.generation.decode import decode_step, prefill
from optjax.generation.options import Options
from optjax.generation.prefix import Prefix, read_prefix

__all__ = ["GenerateOutput", "Options", "Prefix", "decode_step", "generate", "prefill", "read_prefix", "stream"]
