"""Kernels for TPU and GPU, and when to use them: attention whose scores never lie in the device's memory (Dao et al.
2022), steps of decoding that read what a row has of a cache, and products with weights in 4 bits."""
