"""What a denoiser is told besides the image: text, learned embeddings."""
