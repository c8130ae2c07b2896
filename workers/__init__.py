"""The Celery side: an application, three small tasks, and the clock that each worker runs."""
