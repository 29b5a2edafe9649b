"""Synthetic degradations: the second-order Real-ESRGAN pipeline, its published settings, and clean bicubic."""
