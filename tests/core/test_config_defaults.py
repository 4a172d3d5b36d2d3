"""Settings of a component without its name change the default one."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from hybrid_jax.core.config import parse
from hybrid_jax.core.registry import Registry

SHAPES: Registry[Any] = Registry("shape")


@SHAPES.register("box")
@dataclass(frozen=True)
class Box:
    width: int = 1
    height: int = 1


@SHAPES.register("ball")
@dataclass(frozen=True)
class Ball:
    width: int = 1


@dataclass(frozen=True)
class Drawing:
    shape: Annotated[Any, SHAPES] = Box(width=5, height=7)
    other: Annotated[Any, SHAPES] = field(default_factory=lambda: Box(height=2))


def test_settings_without_a_name_keep_what_else_the_default_says():
    assert parse(Drawing, {"shape": {"height": 3}}) == Drawing(shape=Box(width=5, height=3))
    assert parse(Drawing, {"other": {"width": 3}}) == Drawing(other=Box(width=3, height=2))


def test_a_component_that_is_named_owes_the_default_nothing():
    assert parse(Drawing, {"shape": {"name": "ball"}}) == Drawing(shape=Ball(width=1))
    assert parse(Drawing, {"shape": {"name": "box", "height": 3}}) == Drawing(shape=Box(width=1, height=3))
