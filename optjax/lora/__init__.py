"""Low-rank adapters (Hu et al. 2021, LoRA): small trained matrices beside frozen ones, in PEFT's terms and files."""
