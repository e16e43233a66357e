"""SIGKILL at random moments: the same command with --auto_resume goes on to the undisturbed run's weights, bit by bit.

`KILLS_SEED` repeats a campaign's draws.
"""

import itertools
import os
import random

import pytest

import kills
from kills import KINDS, PHASES, TARGETS, WEIGHTS, Story, Tally

QUICK = 6  # moments


@pytest.fixture
def new_story(model_dir, example_tokenizer_dir, example_rows, tmp_path):
    """`new_story(kind, draw)`: a run in a folder of its own."""
    numbers, rows = itertools.count(), example_rows.read_bytes().splitlines()

    def make(kind, draw):
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return Story(kind, model_dir(KINDS[kind][0], example_tokenizer_dir), rows, folder, draw)

    return make


@pytest.fixture
def undisturbed(new_story):
    """`undisturbed(kinds)`: {kind: the weights of a run that nothing stops}."""

    def run(kinds):
        weights = {}
        for kind in kinds:
            story, tally = new_story(kind, random.Random(0)), Tally()
            story.live([], tally)
            assert not tally.wrong, tally.wrong
            weights[kind] = story.weights()
        return weights

    return run


def seed():
    chosen = int(os.environ.get("KILLS_SEED", random.randrange(10**6)))
    print(f"KILLS_SEED={chosen}")
    return random.Random(chosen)


def test_some_kills_change_nothing(new_story, undisturbed):
    """Two stories, each phase once."""
    draw, tally = seed(), Tally()
    kinds = draw.sample(["one process", "LoRA", "packed", "epoch's end"], 2)
    phases = [["tokenizing", "saving", "rotating"], ["loading", "stepping", "exporting"]]
    plans = (
        (new_story(kind, draw), [(phase, draw.choice(TARGETS)) for phase in some]) for kind, some in zip(kinds, phases)
    )
    for _ in kills.tell(plans, undisturbed(kinds), tally):
        pass
    print(tally.table())
    assert not tally.wrong, tally.table()
    assert tally.count() >= QUICK - 2 and tally.lost <= kills.SAVE_STEPS


@pytest.mark.campaign
@pytest.mark.needs_gxx
def test_200_kills_change_nothing(new_story, undisturbed):
    """At least 20 of each kind and each phase."""
    draw, tally = seed(), Tally()

    def missing(kind=None, phase=None):
        return max(0, 20 * WEIGHTS.get(phase, 1) - tally.count(kind, phase))

    def plans():
        for _ in range(400):
            kind = max(KINDS, key=lambda kind: (missing(kind=kind), draw.random()))
            wanted = {phase: missing(phase=phase) + 1 for phase in PHASES}
            phases = draw.choices(PHASES, weights=list(wanted.values()), k=4)
            phases.sort(key=lambda phase: {"tokenizing": 0, "exporting": 2}.get(phase, 1))
            yield new_story(kind, draw), [(phase, draw.choice(TARGETS)) for phase in phases]

    for _ in kills.tell(plans(), undisturbed(KINDS), tally):
        print(tally.table(), flush=True)
        if (
            tally.count() >= 200
            and not any(missing(kind=k) for k in KINDS)
            and not any(missing(phase=p) for p in PHASES)
        ):
            break
    assert not tally.wrong and tally.count() >= 200, tally.table()
    assert tally.lost <= kills.SAVE_STEPS
    assert all(tally.count(kind=kind) >= 20 for kind in KINDS) and all(tally.count(phase=p) >= 20 for p in PHASES)
