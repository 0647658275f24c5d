"""The model a user holds: generation, sessions, fail-over. Never imports server code."""
