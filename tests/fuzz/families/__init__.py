"""All families, by name."""

from __future__ import annotations

from fuzz.families import archives, flags, models, pickles, requests, states, tokenizers, training
from fuzz.job import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (models, tokenizers, states, pickles, archives, training, flags, requests)
    for family in module.FAMILIES
}
