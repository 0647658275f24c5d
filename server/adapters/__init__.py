"""Adapters (PETs): small changes of the base model, each for rows of its own, all in the same batch.

`forms` is what every kind becomes, `importing` reads files into it, `applied` runs it in the flattened batch, and
`registry` knows which adapters this server has.
"""
