"""The run itself, one file a stage."""
