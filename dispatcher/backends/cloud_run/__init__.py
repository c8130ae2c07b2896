"""Google Cloud Run Jobs: an execution of a job is ours, its tasks are our chunks.

`outcomes.py` opens with the table from the provider's words to outcomes. What a run of a job can
vary (args, env, number of tasks, timeout) is in `launching.py`; what the job's own definition fixes
(image, size, network, retries, parallelism) in `definitions.py`; what is asked of the API to follow
executions in `reading.py`, and what is remembered of the answers in `memory.py`.

Comments name where a fact about Cloud Run is from: [C] the client package's own documentation, [D]
the vendor's pages, [I] issues, [U] not seen on a live account yet.
"""

from dispatcher.backends.cloud_run.backend import CloudRunBackend
from dispatcher.backends.cloud_run.options import CloudRunOptions, CloudRunSettings

__all__ = ["CloudRunBackend", "CloudRunOptions", "CloudRunSettings"]
