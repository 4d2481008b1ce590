"""The order of callbacks in virtual time, written out."""

from serving.simulation.event_loop import EventLoop


class Told:
    """A loop, and what it called when."""

    def __init__(self):
        self.loop, self.calls = EventLoop(), []

    def note(self, name):
        self.calls.append((self.loop.now_ns, name))

    def run(self):
        self.loop.run()
        return self.calls


def test_what_is_ready_comes_in_the_order_of_the_calls_and_in_rounds():
    told = Told()

    def first(name):
        told.note(name)
        told.loop.call_soon(told.note, "asked for by the first")

    told.loop.call_soon(first, "first")
    told.loop.call_soon(told.note, "second")
    assert told.run() == [(0, "first"), (0, "second"), (0, "asked for by the first")]


def test_what_is_due_comes_by_instant_after_all_that_is_ready():
    told = Told()
    told.loop.call_at(20, told.note, "late", gives_way=False)
    told.loop.call_at(10, told.note, "early", gives_way=False)
    told.loop.call_at(0, told.note, "now", gives_way=False)
    told.loop.call_soon(told.note, "ready")
    assert told.run() == [(0, "ready"), (0, "now"), (10, "early"), (20, "late")]
    assert told.loop.now_ns == 20


def test_equal_instants_come_in_the_order_of_the_calls():
    told = Told()
    for name in ("a", "b", "c"):
        told.loop.call_at(10, told.note, name, gives_way=False)
    assert told.run() == [(10, "a"), (10, "b"), (10, "c")]


def test_equal_instants_come_by_the_instant_of_the_call_first():
    """The plain plane would have asked for the third at 1, for the second at 4, for the first now, at 5."""
    told = Told()

    def ask(_):
        told.loop.call_at(10, told.note, "now", gives_way=False)
        told.loop.call_at(10, told.note, "at 4", gives_way=False, called_ns=4)
        told.loop.call_at(10, told.note, "at 1", gives_way=False, called_ns=1)
        told.loop.call_at(10, told.note, "at 4, later", gives_way=False, called_ns=4)

    told.loop.call_at(5, ask, None)
    assert told.run() == [(10, "at 1"), (10, "at 4"), (10, "at 4, later"), (10, "now")]


def test_what_gives_way_lets_all_that_is_due_at_its_instant_go_first():
    told = Told()
    told.loop.call_at(10, told.note, "gives way")
    told.loop.call_at(10, told.note, "first", gives_way=False)
    told.loop.call_at(10, told.note, "second", gives_way=False)
    told.loop.call_at(11, told.note, "an instant later", gives_way=False)
    assert told.run() == [(10, "first"), (10, "second"), (10, "gives way"), (11, "an instant later")]


def test_it_gives_way_once_also_to_those_that_give_way():
    told = Told()
    told.loop.call_at(10, told.note, "a")
    told.loop.call_at(10, told.note, "b")
    told.loop.call_at(10, told.note, "c", gives_way=False)
    # a gives way, then b; c comes; then a and b, which have given way. Only the last of an instant gives way to nobody.
    assert told.run() == [(10, "c"), (10, "a"), (10, "b")]


def test_what_was_asked_for_while_it_gave_way_comes_behind_it():
    told = Told()

    def first(name):
        told.note(name)
        told.loop.call_at(10, told.note, "asked for at 10", gives_way=False)

    told.loop.call_at(10, told.note, "gives way")
    told.loop.call_at(10, first, "first", gives_way=False)
    assert told.run() == [(10, "first"), (10, "gives way"), (10, "asked for at 10")]


def test_rounds_of_one_instant_come_before_what_is_due_at_it():
    told = Told()

    def ask(name):
        told.note(name)
        told.loop.call_soon(told.note, "its round")

    told.loop.call_at(10, ask, "first", gives_way=False)
    told.loop.call_at(10, told.note, "second", gives_way=False)
    assert told.run() == [(10, "first"), (10, "its round"), (10, "second")]
