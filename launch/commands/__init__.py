"""The commands of `isr`, one module each: `run(command, arguments)` returns the exit code."""
