"""The embedded tiny foundation: its recipe and, in `weights/`, what it made."""
