"""What foveate tells: passes and what they gained, tables, pictures."""
