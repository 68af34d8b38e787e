"""One run, from its settings to its report; all of it in the process that the user started."""
