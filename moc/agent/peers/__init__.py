"""What agents of several nodes tell each other, over HTTP; nothing here runs, or is imported, on one node."""
