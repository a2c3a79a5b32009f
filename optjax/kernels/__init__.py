"""Attention by flash kernels (Dao et al. 2022), whose scores never lie in the device's memory, and when to use them."""
