"""Facts and operations of several processes compared, with threads in place of processes."""

import concurrent.futures
import socket
import threading

import pytest

from kbtrain.distributed.agreement import CollectiveSequence, agree
from kbtrain.errors import DistributedError
from kbtrain.utils.machine.processes import ProcessGroup

pytestmark = pytest.mark.core

HOST = socket.gethostname()


class Together:
    """Runs a function in one thread per process, and carries their messages."""

    def __init__(self, size):
        self.size = size
        self.sent = [b""] * size
        self.messages = 0
        self.barrier = threading.Barrier(size, timeout=10)

    def exchange(self, rank):
        def send(data):
            self.sent[rank] = data
            self.messages += 1
            self.barrier.wait()
            found = list(self.sent)
            self.barrier.wait()
            return found

        return send

    def run(self, function, values):
        """What the function gives for the value of each process, or the text of its error."""

        def call(rank):
            try:
                return function(ProcessGroup(rank, self.size), self.exchange(rank), values[rank])
            except DistributedError as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(call, range(self.size)))


def compare(*facts):
    together = Together(len(facts))
    texts = together.run(agree, facts)
    assert len(set(texts)) == 1  # the same in all processes
    return texts[0], together.messages / len(facts)


SHAPES = [["dense/kernel", [4, 3], "float32"], ["dense/bias", [3], "float32"]]


def test_equal_facts_cost_one_short_message():
    facts = {
        "kbtrain": "0.2.0",
        "learning_rate": 0.1,
        "variables": 1000 * SHAPES,
        "nan": float("nan"),
    }
    assert compare(facts, dict(reversed(facts.items())), facts) == (None, 1)


@pytest.mark.parametrize(
    ("fact", "values", "named"),
    [
        ("learning_rate", [0.1, 0.2], "1|learning_rate=0.2|0|0.1"),
        ("learning_rate", [0.1, 0.2, 0.2], "0|learning_rate=0.1|1|0.2"),  # most are right
        ("kbtrain", ["0.2.0", "0.2.0", "0.3.0"], "2|kbtrain='0.3.0'|0|'0.2.0'"),
        ("batches", [12, 12.0], "1|batches=12.0|0|12"),
        (
            "variables",
            [SHAPES, [SHAPES[0], ["dense/bias", [4], "float32"]]],
            "1|variables[1][1][0]=4|0|3",
        ),
        (
            "variables",
            [SHAPES, SHAPES[:1]],
            "1|variables[1]=nothing|0|['dense/bias', [3], 'float32']",
        ),
        ("args", [{"a": 1}, {"a": 1, "b": [True]}], "1|args['b']=[True]|0|nothing"),
        ("text", ["x" * 10**6, "y" * 10**6], f"1|text='{'y' * 116}...|0|'{'x' * 116}..."),
    ],
)
def test_a_difference_is_named_in_all_processes(fact, values, named):
    other, has, usual, there = named.split("|")
    text, messages = compare(*({"same": [1, 2], fact: value} for value in values))
    assert text.startswith(
        f"The processes of this run differ: process {other} (host {HOST}) has {has}, process "
        f"{usual} (host {HOST}) has {there}. All processes have to run"
    )
    assert messages == 3


def test_a_fact_that_a_process_lacks_is_named():
    text, _ = compare({"learning_rate": 0.1}, {"learning_rate": 0.1, "warmup_steps": 3})
    assert (
        f"process 1 (host {HOST}) has warmup_steps=3, process 0 (host {HOST}) has nothing." in text
    )


def test_three_differences_are_named():
    text, _ = compare(*({name: rank for name in "abcd"} for rank in range(2)))
    assert text.count("process 1") == 3


def test_one_process_agrees_with_itself():
    assert agree(ProcessGroup(), None, {"learning_rate": 0.1}) is None


def test_the_first_collective_operation_that_differs_is_named():
    rounds = [
        [["all_sum of float32[8,2]", "all_gather of int32[]"]] * 2,
        [[], []],
        [
            ["all_sum of float32[3]", "all_sum of float32[4]"],
            ["all_sum of float32[3]", "all_sum of bfloat16[4]"],
        ],
    ]

    def run(group, exchange, operations):
        sequence = CollectiveSequence(group, exchange)
        passed = []
        for each in operations:
            try:
                sequence.compare(each)
                passed.append(True)
            except DistributedError as error:
                return passed, str(error)
        return passed, None

    together = Together(2)
    results = together.run(run, [[each[rank] for each in rounds] for rank in range(2)])
    assert results[0] == results[1]
    passed, text = results[0]
    assert passed == [True, True]
    assert (
        f"process 1 (host {HOST}) has collective operation 4='all_sum of bfloat16[4]', process 0 "
        f"(host {HOST}) has 'all_sum of float32[4]'"
    ) in text


def compared(operations, places):
    def run(group, exchange, given):
        CollectiveSequence(group, exchange, lambda: given[1]).compare(given[0])

    return Together(2).run(run, list(zip(operations, places, strict=True)))[0]


def test_an_operation_that_a_process_does_not_call_is_named():
    text = compared([["all_sum", "all_sum"], ["all_sum"]], ["update 1"] * 2)
    assert "has collective operation 2=nothing" in text


def test_the_first_line_of_a_program_that_differs_is_named():
    programs = [[["module", "add", "return"]], [["module", "subtract", "return"]]]
    assert "has program 1[1]='subtract', process 0" in compared(programs, ["update 1"] * 2)


def test_processes_at_different_places_are_named():
    text = compared([["all_sum"], ["all_sum"]], ["update 3", "batch 0 of an evaluation"])
    assert "has the place='batch 0 of an evaluation', process 0" in text
