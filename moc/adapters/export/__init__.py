"""Exports of one checkpoint to formats of other tools; they need no engine, no ranks and no accelerator."""
