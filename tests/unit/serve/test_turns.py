import asyncio

import pytest

from selfroute.serve.turns import BETWEEN, TOGETHER, Turns


def test_one_begins_every_few_iterations_and_the_first_come_first() -> None:
    async def run() -> list[tuple[int, str]]:
        turns, seen, iteration = Turns(), list[tuple[int, str]](), 0

        async def begin(name: str) -> None:
            await turns.mine()
            seen.append((iteration, name))

        tasks = [asyncio.create_task(begin(name)) for name in "abc"]
        while len(seen) < len(tasks):
            await asyncio.sleep(0)
            iteration += 1
        await asyncio.gather(*tasks)
        return seen

    seen = asyncio.run(run())
    assert [name for _, name in seen] == ["a", "b", "c"]
    first, second, third = (iteration for iteration, _ in seen)
    # The second's task goes on in the iteration after it was told.
    assert (second - first, third - second) == (BETWEEN + 1, BETWEEN)


def test_the_last_of_a_queue_goes_on_before_whoever_comes_behind() -> None:
    async def run() -> int:
        turns, begun = Turns(), list[int]()

        async def begin() -> None:
            await turns.mine()
            begun.append(iteration)

        iteration = 0
        tasks = [asyncio.create_task(begin()) for _ in range(2)]
        while len(begun) < 3:
            if len(begun) == len(tasks) == 2:
                tasks.append(asyncio.create_task(begin()))
            await asyncio.sleep(0)
            iteration += 1
        await asyncio.gather(*tasks)
        return begun[2] - begun[1]

    assert asyncio.run(run()) == BETWEEN


def test_what_is_under_way_ends_before_the_next_begins() -> None:
    async def run() -> list[str]:
        turns, said, answered = Turns(), list[str](), asyncio.Event()

        async def under_way() -> None:
            await answered.wait()
            for step in range(BETWEEN):
                said.append(f"step {step}")
                await asyncio.sleep(0)

        async def begin(name: str) -> None:
            await turns.mine()
            said.append(name)
            answered.set()

        await asyncio.gather(under_way(), begin("first"), begin("second"))
        return said

    assert asyncio.run(run()) == ["first", *(f"step {step}" for step in range(BETWEEN)), "second"]


def test_several_begin_together_where_many_wait() -> None:
    async def run() -> list[int]:
        turns, begun, each = Turns(), 0, list[int]()

        async def begin() -> None:
            nonlocal begun
            await turns.mine()
            begun += 1

        tasks = [asyncio.create_task(begin()) for _ in range(1 + 2 * TOGETHER)]
        before = 0
        while begun < len(tasks):
            await asyncio.sleep(0)
            if begun > before:
                each.append(begun - before)
                before = begun
        await asyncio.gather(*tasks)
        return each

    each = asyncio.run(run())
    # Nobody waits for the first; then 16, 13, 11, 9, 7, ... do.
    assert each[:6] == [1, 3, 2, 2, 2, 1]
    assert sum(each) == 1 + 2 * TOGETHER


def test_whoever_comes_alone_does_not_wait() -> None:
    async def run() -> bool:
        turns = Turns()
        for _ in range(3):
            mine = asyncio.ensure_future(turns.mine())
            await asyncio.sleep(0)
            if not mine.done():
                return False
            for _ in range(BETWEEN):
                await asyncio.sleep(0)
        return True

    assert asyncio.run(run())


@pytest.mark.parametrize("after", range(2 * BETWEEN))
def test_whoever_is_cancelled_holds_up_nobody(after: int) -> None:
    async def run() -> list[str]:
        turns, begun = Turns(), list[str]()

        async def begin(name: str) -> None:
            await turns.mine()
            begun.append(name)

        tasks = {name: asyncio.create_task(begin(name)) for name in "abcd"}
        for _ in range(1 + after):
            await asyncio.sleep(0)
        cancelled = tasks["b"].cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return [name for name in begun if name != "b" or cancelled]

    assert asyncio.run(run()) == ["a", "c", "d"]


def test_all_that_are_cancelled_leave_the_way_free() -> None:
    async def run() -> bool:
        turns = Turns()
        await turns.mine()
        waiting = [asyncio.ensure_future(turns.mine()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        for _ in range(2 * BETWEEN):
            await asyncio.sleep(0)
        mine = asyncio.ensure_future(turns.mine())
        await asyncio.sleep(0)
        return mine.done()

    assert asyncio.run(run())
