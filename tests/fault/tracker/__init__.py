"""Workers and watchers on two replicas while the parts they need fail: processes, their history, and its checker."""
