"""Weights in 8 and 4 bits: which, how, and the products that read them as they are."""
