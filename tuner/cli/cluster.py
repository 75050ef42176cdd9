"""The commands for a cluster: `tuner render`, `tuner submit` and what follows a run there."""
