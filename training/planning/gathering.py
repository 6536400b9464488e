"""Which weights ZeRO-3 gathers when: DeepSpeed 0.19.8's coordinator, followed module by module through one pass.

Its rules (runtime/zero/partitioned_param_coordinator.py) are too entangled for a formula:

- a module that begins gathers what it lacks by one call, and then by another what comes next in the recorded order,
  until `prefetch_bucket_size` elements are under way or `LIVE_ELEMENTS` are gathered;
- on its way ahead it passes over weights that are gathered already, and these stay until the use that it has seen.
  It runs far ahead: each of the small modules before the first block lets it go one bucket further;
- a module that ends releases its weights, unless they come again within `LIVE_ELEMENTS` of the recorded order. For a
  block the whole model, in which it lies, comes again where the backward pass begins.

So a model of up to about LIVE_ELEMENTS is gathered once for both passes, and of a larger one all but the first blocks.
tests/training/planning/test_communication.py counts what two ranks really gather.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from models.var import NO_CHECKPOINTING, VARConfig
from training.engine.engine import LIVE_ELEMENTS, EngineConfig
from training.planning.parameter_shapes import (
    CLASSES,
    FINAL_LINEAR,
    FINAL_NORM,
    HEAD,
    INPUTS,
    ROOT,
    SCALES,
    SHARED,
    block_shapes,
    end_shapes,
)


@dataclass(frozen=True)
class Gathered:
    """What all calls of one pass gather."""

    elements: int
    calls: int


@dataclass(frozen=True)
class Gathering:
    """One forward and backward pass. Elements are those of tensors that are not whole on every rank at all times."""

    forward: Gathered
    backward: Gathered
    at_loss: int  # elements that are whole when the forward pass is over
    at_block: tuple[int, ...]  # elements that are whole, or under way, in the backward pass of each block
    is_block_gathered_again: tuple[bool, ...]


@dataclass(frozen=True)
class Event:
    """A module begins or ends."""

    module: str
    is_begin: bool


@dataclass(frozen=True)
class Module:
    """Indices of parameters. A leaf is gathered and released as a whole, any other module in its own parameters."""

    own: tuple[int, ...]
    all: tuple[int, ...]
    is_leaf: bool = False

    @property
    def handled(self) -> tuple[int, ...]:
        return self.all if self.is_leaf else self.own


@dataclass(frozen=True)
class Limits:
    """In elements."""

    prefetch: int  # under way at once, of what is read ahead
    live: int  # gathered at once; also how far ahead a use keeps weights gathered
    persistent: int  # tensors up to this size are whole on every rank


def gathering(model: VARConfig, engine: EngineConfig, live_elements: int = LIVE_ELEMENTS) -> Gathering:
    """What one micro-batch gathers under ZeRO-3, on more than one rank."""
    limits = Limits(engine.prefetch_bucket_size, live_elements, engine.persistence_threshold)
    return _gathering(model, limits, engine.activation_checkpointing != NO_CHECKPOINTING)


@lru_cache(maxsize=256)
def _gathering(model: VARConfig, limits: Limits, is_recomputed: bool) -> Gathering:
    ahead, back = _forward_events(model), _backward_events(model, is_recomputed)
    coordinator = _Coordinator(model, limits, [event.module for event in ahead + back if event.is_begin])
    for event in ahead:
        coordinator.follow(event)
    forward, at_loss = coordinator.take_calls(), coordinator.num_live
    at_module: dict[str, int] = {}
    for event in back:
        coordinator.follow(event)
        if event.is_begin:
            at_module[event.module] = coordinator.num_live
    backward = coordinator.take_calls()
    again = {index for call in backward for index in call}
    blocks = _block_names(model)
    return Gathering(
        coordinator.count(forward),
        coordinator.count(backward),
        at_loss,
        tuple(at_module[block] for block in blocks),
        tuple(not again.isdisjoint(coordinator.modules[block].all) for block in blocks),
    )


class _Coordinator:
    """DeepSpeed's bookkeeping, over the indices of parameters in their order in the model."""

    def __init__(self, model: VARConfig, limits: Limits, visits: list[str]) -> None:
        self.modules, self._elements = _modules(model)
        self._visits = [self.modules[name] for name in visits]
        self._limits = limits
        self._persistent = {i for i, size in enumerate(self._elements) if size <= limits.persistent}
        self._whole = set(self._persistent)
        self._queue = deque((index, step) for step, visit in enumerate(self._visits) for index in visit.handled)
        self._seen_until = [-1] * len(self._elements)  # the last visit of a parameter that was read off the queue
        self._step = 0
        self._calls: list[list[int]] = []
        self.num_live = 0

    def follow(self, event: Event) -> None:
        module = self.modules[event.module]
        if event.is_begin:
            self._begin(module)
        else:
            self._end(module)

    def take_calls(self) -> list[list[int]]:
        """What has been gathered since the last time: the parameters of each call."""
        calls, self._calls = self._calls, []
        return calls

    def count(self, calls: list[list[int]]) -> Gathered:
        return Gathered(sum(self._elements[index] for call in calls for index in call), len(calls))

    def _begin(self, module: Module) -> None:
        self._gather([index for index in module.handled if index not in self._whole])
        unread = {index for index in module.handled if self._seen_until[index] < self._step}
        while self._queue and unread:
            index, step = self._queue.popleft()
            self._seen_until[index] = step
            unread.discard(index)
        self._gather(self._read_ahead())
        self._step += 1

    def _read_ahead(self) -> list[int]:
        wanted: dict[int, None] = {}
        under_way, most = 0, min(self._limits.live - self.num_live, self._limits.prefetch)
        while self._queue and under_way < most:
            index, step = self._queue.popleft()
            self._seen_until[index] = max(self._seen_until[index], step)
            if index not in self._whole and index not in wanted:
                wanted[index] = None
                under_way += self._elements[index]
        return list(wanted)

    def _gather(self, indices: list[int]) -> None:
        if indices:
            self._calls.append(indices)
            self._whole.update(indices)
            self.num_live += sum(self._elements[index] for index in indices)

    def _end(self, module: Module) -> None:
        released = {i for i in module.handled if self._seen_until[i] <= self._step} - self._persistent
        distance = 0
        for visit in self._visits[self._step :]:
            if distance >= self._limits.live or not released:
                break
            used = visit.all if module.is_leaf else visit.own
            released.difference_update(used)
            distance += sum(self._elements[index] for index in used)
        released &= self._whole
        self._whole -= released
        self.num_live -= sum(self._elements[index] for index in released)


def _block_names(model: VARConfig) -> list[str]:
    return [f"blocks.{layer}" for layer in range(model.depth)]


def _modules(model: VARConfig) -> tuple[dict[str, Module], list[int]]:
    """All modules that have hooks, and the elements of every parameter."""
    ends, blocks = end_shapes(model), {name: block_shapes(model) for name in _block_names(model)}
    before = {name: shapes for name, shapes in ends.items() if name not in (FINAL_NORM, FINAL_LINEAR, HEAD)}
    elements: list[int] = []
    held: dict[str, tuple[int, ...]] = {}
    for name, shapes in (before | blocks | ends).items():  # before the blocks, these, what is left: the model's order
        held[name] = tuple(range(len(elements), len(elements) + len(shapes)))
        elements += [prod(shape) for shape in shapes]
    modules = {name: Module(() if name in blocks else own, own, name in blocks) for name, own in held.items()}
    modules[ROOT] = Module(held[ROOT], tuple(range(len(elements))))
    modules.setdefault(FINAL_NORM, Module((), held.get(FINAL_LINEAR, ())))
    return modules, elements


def _forward_events(model: VARConfig) -> list[Event]:
    ends = end_shapes(model)
    embeddings = [CLASSES, INPUTS, SCALES] + [SHARED] * (SHARED in ends)
    within = _both(FINAL_LINEAR) if FINAL_LINEAR in ends else []
    events = [event for name in embeddings + _block_names(model) for event in _both(name)]
    return [Event(ROOT, True), *events, *_around(FINAL_NORM, within), *_both(HEAD), Event(ROOT, False)]


def _backward_events(model: VARConfig, is_recomputed: bool) -> list[Event]:
    """A block that is computed again begins twice. The modules that begin without an end are never told of one."""
    ends = end_shapes(model)
    norm = _around(FINAL_NORM, _both(FINAL_LINEAR)) if FINAL_LINEAR in ends else [Event(FINAL_NORM, True)]
    visits = 2 if is_recomputed else 1
    blocks = [
        event for name in reversed(_block_names(model)) for event in [Event(name, True)] * visits + [Event(name, False)]
    ]
    shared = _both(SHARED) if SHARED in ends else []
    embeddings = [Event(name, True) for name in (SCALES, INPUTS, CLASSES)]
    return [Event(ROOT, True), *_both(HEAD), *norm, *blocks, *shared, *embeddings]


def _both(name: str) -> list[Event]:
    return [Event(name, True), Event(name, False)]


def _around(name: str, within: list[Event]) -> list[Event]:
    return [Event(name, True), *within, Event(name, False)]
