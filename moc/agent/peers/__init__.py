"""How the agents of several nodes talk and decide together. On one node nothing of it runs, and nothing listens."""
