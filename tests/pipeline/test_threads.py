"""Threads that do what they are asked for, and what they find out."""

import gc
import threading
import time
import weakref

import pytest

from datarax.pipeline._threads import Outcome, Threads

pytestmark = pytest.mark.internal


@pytest.fixture
def threads():
    made = Threads(2, "test")
    yield made
    made.close()


def test_what_is_found_is_told_to_who_waits_for_it(threads):
    outcome = Outcome()
    assert not outcome.known
    threads.submit(lambda: time.sleep(0.05) or outcome.tell(7))
    assert outcome.result() == 7
    assert outcome.known
    assert (outcome.error(), outcome.result()) == (None, 7)  # as often as it is asked


def test_an_error_is_told_to_who_waits_for_it(threads):
    outcome, error = Outcome(), ValueError("none there")
    threads.submit(lambda: outcome.tell(error=error))
    for _ in range(2):
        with pytest.raises(ValueError, match="none there"):
            outcome.result()
    assert outcome.error() is error


@pytest.mark.parametrize("patience", [0.0, 1e-4, 1e-3])
def test_who_is_impatient_gets_every_part_as_it_is_told(threads, patience):
    for _ in range(20):
        outcome, got = Outcome(), []

        def read(outcome=outcome):
            for i in range(50):
                outcome.tell_part(i)
                time.sleep(i % 7 * 1e-4)
            outcome.tell(outcome.parts)

        threads.submit(read)
        while len(got) < 50:
            outcome.wait_for_part(len(got), patience)
            new = outcome.parts[len(got) :]
            assert new
            got += new
        assert got == [*range(50)] == outcome.result()


def test_a_part_is_waited_for_until_it_is_told(threads):
    outcome, got = Outcome(), threading.Event()

    def read():
        time.sleep(0.05)
        outcome.tell_part("first")
        got.wait(60)
        outcome.tell_part("second")
        outcome.tell(outcome.parts)

    threads.submit(read)
    outcome.wait_for_part(0, 0.01)
    assert (outcome.parts, outcome.known) == (["first"], False)
    got.set()
    outcome.wait_for_part(2, 0.01)
    assert outcome.known


def test_who_is_patient_waits_for_the_whole(threads):
    outcome = Outcome()

    def read():
        for i in range(5):
            outcome.tell_part(i)
            time.sleep(0.01)
        outcome.tell(outcome.parts)

    threads.submit(read)
    outcome.wait_for_part(0, 60.0)
    assert outcome.known
    assert len(outcome.result()) == 5


def test_what_comes_first_is_begun_first():
    threads, begun = Threads(1, "test"), []
    done = Outcome()
    for i in range(100):
        threads.submit(lambda i=i: begun.append(i))
    threads.submit(lambda: done.tell(None))
    done.result()
    threads.close()
    assert begun == [*range(100)]


def test_there_are_as_many_at_work_as_there_are_threads(threads):
    barrier, outcomes = threading.Barrier(2), [Outcome() for _ in range(2)]
    for outcome in outcomes:
        threads.submit(lambda outcome=outcome: outcome.tell(barrier.wait(10)))
    assert sorted(outcome.result() for outcome in outcomes) == [0, 1]


def test_those_that_are_closed_end_after_what_they_are_at():
    before = set(threading.enumerate())
    threads, go, outcome = Threads(1, "test"), threading.Event(), Outcome()
    (thread,) = set(threading.enumerate()) - before
    threads.submit(lambda: outcome.tell(go.wait(10)))
    threads.close()
    assert thread.is_alive()
    go.set()
    assert outcome.result()
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(
        RuntimeError, match=r"^The program is ending, and no rows are read any more"
    ):
        threads.submit(print)


def test_a_thread_that_waits_holds_nothing_of_what_it_has_done(threads):
    class Data:
        def use(self):
            outcome.tell(None)

    outcome, data = Outcome(), Data()
    gone = weakref.ref(data)
    threads.submit(data.use)
    outcome.result()
    del data
    until = time.monotonic() + 10
    while gone() is not None and time.monotonic() < until:
        gc.collect()
    assert gone() is None
