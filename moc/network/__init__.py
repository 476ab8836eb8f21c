"""The network between nodes: the port and its implementation over HTTP."""
