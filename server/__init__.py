"""One span of blocks on one device: engine, KV cache, handlers. Never imports client code."""
