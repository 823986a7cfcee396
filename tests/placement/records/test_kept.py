"""Answers are computed once for each owner, and go with it."""

import gc
import weakref

from crossdock.placement.records.kept import kept_with_first


class Owner:
    pass


def test_an_answer_is_computed_once_for_an_owner_and_further_arguments() -> None:
    asked = []

    @kept_with_first
    def answer(owner: Owner, number: int, more: int = 0) -> list[int]:
        asked.append(number)
        return [number + more]

    first, second = Owner(), Owner()
    assert answer(first, 1) is answer(first, 1)
    assert answer(first, 1, more=1) == answer(first, 1, more=1) == [2]
    assert answer(first, 2) == answer(second, 2)
    assert answer(first, 2) is not answer(second, 2)
    assert asked == [1, 1, 2, 2]


def test_answers_are_forgotten_with_their_owner() -> None:
    @kept_with_first
    def answer(owner: Owner) -> Owner:
        return Owner()

    owner = Owner()
    kept = weakref.ref(answer(owner))
    assert kept() is not None
    del owner
    gc.collect()
    assert kept() is None
