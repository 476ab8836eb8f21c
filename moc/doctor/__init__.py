"""`moc doctor`: one bundle with what is needed to judge a job from afar, and what looks wrong in it.

`node` and `collect` look, `judge` decides (pure), `bundle` writes without secrets.
"""
