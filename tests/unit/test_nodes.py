from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from sft_job.config.topology import Topology
from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.nodes import Nodes, Word
from tests.ranks import free_port

PATIENCE = 60.0


@pytest.fixture
def node() -> Iterator[Callable[..., Nodes]]:
    """``node(rank)`` of three on this host; all are hung up at the end."""
    port, made = free_port(), []

    def make(rank: int, patience: float = PATIENCE, stopped: Callable[[], bool] = lambda: False) -> Nodes:
        made.append(Nodes(Topology(1, 3, rank, "127.0.0.1", port), patience, stopped))
        return made[-1]

    make.port = port  # type: ignore[attr-defined]
    yield make
    for each in made:
        each.close()


def ended(nodes: Nodes) -> tuple[int, str]:
    with pytest.raises(JobError) as caught:
        nodes.agree(Word())
    return caught.value.code, str(caught.value)


def test_alone_there_is_nobody_to_ask() -> None:
    nodes = Nodes(Topology(1, 1, 0, "", None), PATIENCE, lambda: False)
    assert nodes.agree(Word()) == Word()
    assert nodes.agree(Word(65, "data")) == Word(65, "data")


def test_all_hear_each_word_once_all_are_there(node) -> None:
    """They ask before the first one listens, and each waits for the first one's second word."""
    others = [node(1), node(2)]
    with ThreadPoolExecutor(2) as pool:
        first_words = [pool.submit(other.agree, Word()) for other in others]
        first = node(0)
        assert first.agree(Word()) == Word()
        assert [word.result() for word in first_words] == [Word(), Word()]
        # The port is free for the ranks from here on.
        socket.create_server(("", node.port)).close()
        second_words = [pool.submit(other.agree, Word()) for other in others]
        assert not any(word.done() for word in second_words)
        text = "rows cannot be read\n    fix: é" * 10_000
        first.agree(Word(65, text))
        assert [word.result() for word in second_words] == [Word(65, text)] * 2
    first.end(JobError(ExitCode.BUG, "nobody waits for a word any more"))


def test_an_end_before_the_first_word(node) -> None:
    others = [node(1), node(2)]
    with ThreadPoolExecutor(2) as pool:
        words = [pool.submit(other.agree, Word()) for other in others]
        node(0).end(JobError(ExitCode.NO_CHECKPOINT, "no checkpoint is usable"))
        assert [word.result() for word in words] == [Word(74, "no checkpoint is usable")] * 2


def test_strangers_at_the_port_are_no_nodes(node) -> None:
    first, other, restarted = node(0), node(1), node(1)
    with ThreadPoolExecutor(3) as pool:
        strangers = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(3)]
        for stranger, text in zip(
            strangers, (b"GET / HTTP/1.1\r\n", b"sft_job node 7", b"sft_job node x"), strict=True
        ):
            stranger.sendall(text)
        socket.create_connection(("127.0.0.1", node.port)).close()
        gone = pool.submit(ended, other)
        word = pool.submit(first.agree, Word())
        while 1 not in first._asked:
            assert not word.done()
        again = pool.submit(restarted.agree, Word())
        assert gone.result()[0] == ExitCode.LOST  # the one that was started anew takes its place
        last = pool.submit(node(2).agree, Word())
        assert word.result() == again.result() == last.result() == Word()
    assert [stranger.recv(10) for stranger in strangers] == [b""] * 3


def test_a_node_that_does_not_come(node) -> None:
    other = node(1)
    with ThreadPoolExecutor(1) as pool:
        word = pool.submit(other.agree, Word())
        assert ended(node(0, patience=1.0)) == (137, "node 2 did not come within 1 s")
        assert word.result() == Word(137, "node 2 did not come within 1 s")


def test_a_first_node_that_does_not_come_or_goes(node) -> None:
    code, message = ended(node(1, patience=0.3))
    assert code == ExitCode.LOST
    assert f"127.0.0.1:{node.port}, cannot be asked where the run begins: no answer within 0.3 s" in message
    with ThreadPoolExecutor(1) as pool:
        word = pool.submit(ended, node(1))
        first = node(0)
        first._gather(0.5)
        first.close()
        assert word.result()[0] == ExitCode.LOST


def test_what_listens_and_says_nothing_is_given_up(node) -> None:
    """The ranks' meeting place of an earlier start takes the call, and waits for what it understands."""
    with socket.create_server(("127.0.0.1", node.port)):
        code, message = ended(node(1, patience=0.2))
    assert code == ExitCode.LOST
    assert "it has said nothing for 0.4 s" in message


def test_the_first_node_may_tokenise_for_as_long_as_it_takes(node) -> None:
    others = [node(rank, patience=0.2) for rank in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        words = [pool.submit(other.agree, Word()) for other in others]
        first = node(0)
        assert first.agree(Word()) == Word()
        assert [word.result() for word in words] == [Word()] * 2
        words = [pool.submit(other.agree, Word()) for other in others]
        assert not wait(words, timeout=1.0).done
        first.agree(Word(ExitCode.DATA, "x"))
        assert [word.result() for word in words] == [Word(65, "x")] * 2


def test_a_stop_while_nodes_wait_for_each_other(node) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        first, called = node(0, stopped=stop.is_set), node(1, stopped=stop.is_set)
        waiting = [pool.submit(ended, each) for each in (first, called)]
        while 1 not in first._asked:
            assert not waiting[0].done()
        stop.set()
        assert {each.result()[0] for each in waiting} <= {ExitCode.STOPPED, ExitCode.LOST}
        assert waiting[0].result()[0] == ExitCode.STOPPED
