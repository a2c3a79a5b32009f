"""Text from a model: `generate` and `stream`, and `prefill` and `decode_step` for loops of one's own."""

from optjax.generation.api import GenerateOutput, generate, stream
from optjax.generation.decode import decode_step, prefill
from optjax.generation.options import Options

__all__ = ["GenerateOutput", "Options", "decode_step", "generate", "prefill", "stream"]
