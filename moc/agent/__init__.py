"""The node agent: owns the arena, persists snapshots, outlives the trainers."""
