"""Places where executions happen. `base.py` is the door; each other module is one kind of place."""
