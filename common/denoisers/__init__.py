"""Denoising networks, each behind one call that gives eps and x0."""
