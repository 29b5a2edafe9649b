"""Code that two or more papers share."""
