"""Where a run is asked for on a cluster."""
