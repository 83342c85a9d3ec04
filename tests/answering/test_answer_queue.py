"""The queue: in turn by client, prefetches last, and an end in order. Without a server."""

import asyncio
import gc
import threading
import weakref

import pytest
from served import FakeEngine

from conversation.answering import answer_queue
from conversation.answering.answer_queue import AnswerQueue, Changed, Ending, Job, QueueFull
from conversation.answering.refusals import Refused
from conversation.errors import UserError


def run(scenario, engine=None, open_engine=None):
    """Run a scenario, a coroutine of a queue, and end the queue."""

    async def main():
        queue = AnswerQueue(open_engine or (lambda: engine or FakeEngine()))
        queue.start()
        try:
            return await asyncio.wait_for(scenario(queue), 120)
        finally:
            await asyncio.to_thread(queue.stop)

    return asyncio.run(main())


def saying(done, name, gate=None):
    def work(engine, stopped):
        if gate:
            gate.wait(60)
        done.append(name)
        yield name

    return work


async def everything(job):
    return [result async for result in job.results()]


def test_who_waits_is_served_in_turn_by_client_and_prefetches_come_last():
    done, gate = [], threading.Event()

    async def scenario(queue):
        jobs = [queue.submit(saying(done, "first", gate), "a")]
        while queue.waiting:  # it is at work
            await asyncio.sleep(0.01)
        jobs += [queue.submit(saying(done, f"p{i}"), "b", prefetch=True) for i in range(2)]
        jobs += [queue.submit(saying(done, f"a{i}"), "a") for i in range(3)]
        jobs += [queue.submit(saying(done, f"b{i}"), "b") for i in range(2)]
        gate.set()
        return [await everything(job) for job in jobs]

    run(scenario)
    assert done == ["first", "a0", "b0", "a1", "b1", "a2", "p0", "p1"]


def test_one_client_cannot_fill_the_queue_for_another(monkeypatch):
    monkeypatch.setattr(answer_queue, "MAX_WAITING", 5)
    monkeypatch.setattr(answer_queue, "MAX_WAITING_OF_ONE", 3)
    gate = threading.Event()

    async def scenario(queue):
        queue.submit(saying([], "at work", gate), "a")
        while queue.waiting:
            await asyncio.sleep(0.01)
        mine = [queue.submit(saying([], "x"), "a") for _ in range(3)]
        with pytest.raises(QueueFull) as caught:
            queue.submit(saying([], "x"), "a")
        assert caught.value.retry_after >= 1
        queue.submit(saying([], "x"), "b")
        mine[0].cancel()  # who left takes no place
        queue.submit(saying([], "x"), "a")
        gate.set()

    run(scenario)


def test_who_left_takes_neither_the_turn_of_its_client_nor_memory():
    done, gate = [], threading.Event()

    def jobs_in_memory():
        return sum(isinstance(each, Job) for each in gc.get_objects())

    async def scenario(queue):
        before = jobs_in_memory()  # other tests may have left some
        queue.submit(saying(done, "first", gate), "z")
        while queue.waiting:
            await asyncio.sleep(0.01)
        left = queue.submit(saying(done, "left"), "a")
        jobs = [queue.submit(saying(done, name), name[0]) for name in ("a1", "b0", "b1")]
        left.cancel()
        forgotten = weakref.ref(left)
        del left
        for number in range(1000):
            queue.submit(saying(done, "left"), f"c{number}").cancel()
        jobs.append(queue.submit(saying(done, "d0"), "d"))
        assert forgotten() is None
        assert jobs_in_memory() - before < 20
        gate.set()
        return [await everything(job) for job in jobs]

    run(scenario)
    assert done == ["first", "a1", "b0", "d0", "b1"]


class Panic(BaseException):
    """As of a library in Rust: pyo3's PanicException is no Exception."""


@pytest.mark.parametrize("kind", [Panic, SystemExit, KeyboardInterrupt, MemoryError])
def test_whatever_a_request_raises_the_next_one_is_served(kind):
    def failing(engine, stopped):
        yield "part"
        raise kind("x")

    async def scenario(queue):
        job = queue.submit(failing, "a")
        assert await job.next() == "part"
        with pytest.raises(Refused, match="the server made a mistake"):
            await job.next()
        assert await everything(queue.submit(saying([], "next"), "a")) == ["next"]

    run(scenario)


def test_a_prefetch_that_comes_out_different_after_it_was_put_back_ends_with_an_error():
    started, turns = threading.Event(), []

    def prefetch(engine, stopped):
        turns.append("prefetch")
        yield f"part of turn {len(turns)}"
        started.set()
        while not stopped() and len(turns) == 1:
            pass

    async def scenario(queue):
        job = queue.submit(prefetch, "a", prefetch=True)
        assert await job.next() == "part of turn 1"
        await asyncio.to_thread(started.wait, 60)
        assert await everything(queue.submit(saying(turns, "question"), "a")) == ["question"]
        with pytest.raises(Changed):
            await job.next()

    run(scenario)
    assert turns == ["prefetch", "question", "prefetch"]


def test_at_the_end_what_is_at_work_is_finished_and_what_waits_is_told():
    done, gate = [], threading.Event()

    async def scenario(queue):
        first, second = queue.submit(saying(done, "first", gate), "a"), queue.submit(saying(done, "second"), "a")
        while queue.waiting > 1:
            await asyncio.sleep(0.01)
        queue.end()
        with pytest.raises(Ending):
            await second.next()
        with pytest.raises(Ending):
            queue.submit(saying(done, "third"), "a")
        gate.set()
        assert await everything(first) == ["first"]

    run(scenario)
    assert done == ["first"]


def test_a_stop_does_not_wait_for_the_answer_at_work():
    engine = FakeEngine()
    engine.hold.clear()

    def work(engine, stopped):
        yield from engine.stream(None, stopped)

    async def scenario(queue):
        job = queue.submit(work, "a")
        while not engine.asked:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(queue.stop)
        with pytest.raises(Ending):
            await job.next()

    run(scenario, engine)
    assert engine.stopped_after == [0]


def test_an_engine_that_cannot_be_opened_refuses_who_waits_and_who_comes_later():
    opening = threading.Event()

    def broken():
        opening.wait(60)
        raise UserError("the model at /home/x is broken")

    async def scenario(queue):
        waiting = [queue.submit(saying([], "x"), "a", prefetch) for prefetch in (False, True)]
        opening.set()
        for job in waiting:
            with pytest.raises(Refused, match=r"^the model cannot be loaded$") as caught:
                await job.next()
            assert caught.value.status == 503
        with pytest.raises(Refused, match=r"^the model cannot be loaded$"):
            queue.submit(saying([], "x"), "a")
        assert str(queue.failure) == "the model at /home/x is broken"

    run(scenario, open_engine=broken)
