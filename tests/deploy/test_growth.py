"""The table on how a cluster grows is what the simulation says, and says what it must."""

from __future__ import annotations

from deploy.ray import growth

from .files import DEPLOY


def test_the_readme_shows_what_the_simulation_prints() -> None:
    assert growth.table() in (DEPLOY / "ray" / "README.md").read_text()


def test_affinity_adds_the_engines_memories_up_and_chance_does_not() -> None:
    one, near, far = (
        growth.simulate(1000, 1, True),
        growth.simulate(1000, 8, True),
        growth.simulate(1000, 8, False),
    )
    assert near.device > one.device + 0.2
    assert abs(far.device - one.device) < 0.02


def test_an_engine_that_holds_all_never_reads() -> None:
    found = growth.simulate(20, 1, True)
    assert (found.device, found.host, found.reading, found.placing) == (1, 0, 0, 0)
