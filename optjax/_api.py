"""Everything that `optjax.name` may be. `optjax` itself imports this when a name is first asked for."""

from optjax.cache import Cache, init_cache
from optjax.checkpoints import load, load_params, save_params
from optjax.config import OPTConfig
from optjax.declaration import Weight, count_params, declare
from optjax.generation import GenerateOutput, Prefix, decode_step, generate, prefill, read_prefix, stream
from optjax.heads import causal_lm, question_answering, sequence_classification
from optjax.kernels.choice import attention_kind
from optjax.lora.adapters import init_adapters
from optjax.lora.apply import merge_adapters, unmerge_adapters, with_adapters
from optjax.lora.config import LoraConfig
from optjax.lora.files import load_adapters, save_adapters
from optjax.lora.layout import place_adapters
from optjax.lora.parts import Adapters
from optjax.model import forward
from optjax.offloading import offload
from optjax.params import Params, abstract_params, init_params, stack_layers, unstack_layers
from optjax.quantization.calibrate import gptq
from optjax.quantization.quantize import Quantization, dequantize, quantize
from optjax.quantization.weight import QuantizedWeight
from optjax.scoring import Score, score
from optjax.tokenizer import Tokenizer

__all__ = [
    "Adapters",
    "Cache",
    "GenerateOutput",
    "LoraConfig",
    "OPTConfig",
    "Params",
    "Prefix",
    "Score",
    "Quantization",
    "QuantizedWeight",
    "Tokenizer",
    "Weight",
    "abstract_params",
    "attention_kind",
    "causal_lm",
    "count_params",
    "declare",
    "decode_step",
    "dequantize",
    "forward",
    "generate",
    "gptq",
    "init_adapters",
    "init_cache",
    "init_params",
    "load",
    "load_adapters",
    "load_params",
    "merge_adapters",
    "offload",
    "place_adapters",
    "prefill",
    "quantize",
    "read_prefix",
    "question_answering",
    "save_adapters",
    "save_params",
    "score",
    "sequence_classification",
    "stack_layers",
    "stream",
    "unmerge_adapters",
    "unstack_layers",
    "with_adapters",
]
