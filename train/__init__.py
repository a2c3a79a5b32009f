"""Pretraining and fine-tuning of OPT."""
