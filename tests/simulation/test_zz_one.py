from simulation.story import *

from dispatcher.states import Outcome
from dispatcher.testing import Fault


def test_f2(database_url):
    db = Database(database_url)
    try:
        tell(
            db,
            Provider(safe=False, obeys_timeout=False, concurrency=1),
            [
                Enqueue("single", 0),
                Sweep(),
                Turn(0, freeze=At("before a transaction", 3)),
                Turn(0),
                Turn(0, die=At("before launch"), freeze=At("before launch")),
                Fails("launch", Fault.REPLY_LOST),
                Turn(0),
                Follow(0, freeze=At("after a commit", 2)),
                Sweep(0),
                Retry(1, True),
                ConsoleCancel(2),
                Advance(2.0),
                Fails("poll", Fault.UNAVAILABLE, times=3),
                Cancel(1),
                TaskEnds(1, Outcome.OUT_OF_MEMORY),
                Turn(1, die=At("after strays", 2), freeze=At("after a commit", 2)),
                Sweep(0),
                Continue(3),
                Continue(0),
                Enqueue("packed", 1),
                Sweep(),
                Advance(0.5),
                Launch(1, die=At("after launch", 2)),
                Advance(33),
                Advance(65),
                Advance(16),
                Follow(1),
                Follow(0, die=At("after a commit", 6), freeze=At("before a transaction", 4)),
                Advance(16.0),
                Advance(33.0),
                Follow(0),
                Plan(1, die=At("before find", 2), freeze=At("after a commit", 6), batch=0),
                ConsoleCancel(2),
                Turn(1, die=At("before cancel", 2), freeze=At("before a transaction", 6)),
                Launch(1, die=At("before a commit", 4)),
            ],
        )
    finally:
        db.close()
