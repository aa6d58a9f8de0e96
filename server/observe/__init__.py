"""The observer: a process that keeps round reports of all runs and serves them to Prometheus and readers."""
