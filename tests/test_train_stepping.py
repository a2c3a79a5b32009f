"""What a step is counted to compute."""

import pytest

from optjax import OPTConfig
from optjax.train.stepping import model_flops

CONFIG = OPTConfig(
    vocab_size=61, hidden_size=16, num_hidden_layers=3, ffn_dim=24, num_attention_heads=2, max_position_embeddings=12
)
ROWS, LENGTH = 4, 12
LAYERS = 3 * 2 * (4 * 16 * 16 + 2 * 16 * 24) * ROWS * LENGTH
ATTENTION = 3 * 2 * 2 * 16 * ROWS * sum(range(1, LENGTH + 1))
VOCABULARY = 2 * 16 * 61 * ROWS * LENGTH


@pytest.mark.parametrize(
    ("head", "frozen", "flops"),
    [
        ("causal_lm", False, 3 * (LAYERS + VOCABULARY + ATTENTION)),
        ("sequence_classification", False, 3 * (LAYERS + ATTENTION)),
        ("causal_lm", True, 2 * (LAYERS + VOCABULARY) + 3 * ATTENTION),
        ("question_answering", True, 2 * LAYERS + 3 * ATTENTION),
    ],
)
def test_flops_by_hand(head, frozen, flops):
    assert model_flops(CONFIG, ROWS, LENGTH, head, frozen=frozen) == flops
