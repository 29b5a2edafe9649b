"""Conditions of a denoiser: text and learned embeddings."""
