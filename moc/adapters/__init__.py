"""The only importers of deepspeed and torch."""
