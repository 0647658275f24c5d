"""Programs that show what the library does. Run one with `python -m swarm.scripts.examples.NAME`."""
