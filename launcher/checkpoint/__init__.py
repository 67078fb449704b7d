"""Checkpoints on storage: a safetensors file and a manifest a rank, and a commit record that is written last. No torch."""
