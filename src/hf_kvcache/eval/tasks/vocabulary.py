"""What needles are made of: words, numbers and identifiers, all of them different."""

from __future__ import annotations

import re
import uuid
from functools import cache

import numpy as np

from hf_kvcache.models import embedded_prose

ADJECTIVES = (
    "amber ancient autumn bashful bitter blazing blunt brave brisk broken calm careful clever coarse copper crimson "
    "crooked curious damp distant dusty eager early elegant faded fierce fragile frosty frozen gentle gilded golden "
    "hollow honest humble hushed idle ivory jagged jolly keen lonely loyal lunar marble mellow merry misty modest "
    "mossy narrow nimble noble olive patient pale placid polished proud quaint quiet rapid restless rough rustic "
    "scarlet serene sharp silent silver sleepy slender smoky solemn sparkling speckled spotless stubborn sturdy "
    "sudden sunny swift tangled tender thorny timid tranquil twisted velvet vivid wandering weary wild windy wooden "
    "woven yellow"
).split()

NOUNS = (
    "acorn almanac anchor anvil apricot badger balcony barrel basin beacon bellows blanket bonnet bramble brook "
    "bucket button cabin candle canyon caravan cellar chapel chimney cider cinder clover cobbler compass cottage "
    "cradle cricket crystal curtain dagger daisy dolphin drawer ember engine falcon feather fennel ferry fiddle "
    "flagon forest fountain furnace gallery garland gazelle ginger glacier goblet granary hammer harbour hatchet "
    "hazel hedgehog helmet heron hillside jacket jasmine kettle kingfisher ladder lantern lemon library lighthouse "
    "lizard locket mallet maple meadow mirror monsoon mortar nettle nutmeg orchard otter oyster paddle parsnip pebble "
    "pepper pigeon pillow plover pocket prairie pulley quarry quilt raven ribbon saddle saffron sapling satchel "
    "shepherd shutter signal sparrow spindle stable steeple stirrup sundial swallow tavern teapot thicket thimble "
    "thunder timber trellis trumpet tulip turnip umbrella valley vessel village vineyard violin walnut warbler "
    "whistle willow windmill zephyr"
).split()


def compounds(n: int, rng: np.random.Generator) -> list[str]:
    """`n` different words such as "quiet-harbour"; with a second adjective where there are too few."""
    parts = [ADJECTIVES, NOUNS] if 2 * n <= len(ADJECTIVES) * len(NOUNS) else [ADJECTIVES, ADJECTIVES, NOUNS]
    shape = [len(part) for part in parts]
    drawn = np.unravel_index(rng.choice(np.prod(shape), n, replace=False), shape)
    return ["-".join(part[i] for part, i in zip(parts, at, strict=True)) for at in zip(*drawn, strict=True)]


def numbers(n: int, rng: np.random.Generator, n_digits: int = 7) -> list[str]:
    """`n` different numbers of `n_digits` digits."""
    least = 10 ** (n_digits - 1)
    return [str(least + i) for i in rng.choice(9 * least, n, replace=False)]


def uuids(n: int, rng: np.random.Generator) -> list[str]:
    """`n` random identifiers of 32 hexadecimal digits (version 4)."""
    drawn = rng.bytes(16 * n)
    return [str(uuid.UUID(bytes=drawn[i : i + 16], version=4)) for i in range(0, len(drawn), 16)]


@cache
def plain_words() -> tuple[str, ...]:
    """English words of five letters or more, in alphabetical order: those above and those of the package's prose."""
    prose = re.findall(r"(?<![\w'-])[a-z]{5,}(?![\w'-])", embedded_prose().read_text(encoding="utf-8"))
    return tuple(sorted({*ADJECTIVES, *NOUNS, *prose}))
