"""How opt-mini, the model that ships in the package, is made: corpus, tokenizer, baselines, evaluation."""
