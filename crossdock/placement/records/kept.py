"""Answers that are kept as long as the object that they are about, and not longer: a topology of 4,096 devices takes gigabytes else."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

Owner = TypeVar("Owner")
Rest = ParamSpec("Rest")
Answer = TypeVar("Answer")


def kept_with_first(function: Callable[Concatenate[Owner, Rest], Answer]) -> Callable[Concatenate[Owner, Rest], Answer]:
    """Compute `function` once for each first argument, told apart by identity, and further arguments, told apart by value.

    The answers must not hold the first argument, or it would never be forgotten. Arguments are given by place.
    """
    kept: WeakKeyDictionary[Owner, dict[tuple[object, ...], Answer]] = WeakKeyDictionary()

    @functools.wraps(function)
    def asked(owner: Owner, /, *rest: Rest.args, **named: Rest.kwargs) -> Answer:
        answers = kept.setdefault(owner, {})
        key = (*rest, *sorted(named.items()))
        if key not in answers:
            answers[key] = function(owner, *rest, **named)
        return answers[key]

    return asked
