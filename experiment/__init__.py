"""One run, from its settings to its report; only the epochs may be computed in other processes."""
