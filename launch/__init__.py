"""The `isr` command and what is around it."""
