"""The map stages by name, and how one is built from the config. Light to import: a stage's module comes in on use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from pipeline.core.errors import ConfigError, suggestion
from stages.base import Stage

STAGES = {
    "image_stats": "stages.columns.image_stats:ImageStats",
    "caption_stats": "stages.columns.caption_stats:CaptionStats",
    "caption_patterns": "stages.columns.caption_patterns:CaptionPatterns",
    "caption_frequency": "stages.columns.caption_frequency:CaptionFrequency",
    "domain_list": "stages.columns.domain_list:DomainList",
    "metaclip": "stages.columns.metaclip:MetaClip",
    "imagenet_words": "stages.columns.imagenet_words:ImagenetWords",
    "language": "stages.columns.language:Language",
    "language_cld3": "stages.columns.language_cld3:LanguageCld3",
    "hashes": "stages.columns.hashes:Hashes",
    "placeholders": "stages.columns.placeholders:Placeholders",
    "minhash": "stages.columns.minhash:MinHash",
    "caption_duplicates": "stages.columns.caption_duplicates:CaptionDuplicates",
    "image_duplicates": "stages.columns.image_duplicates:ImageDuplicates",
    "embedding_duplicates": "stages.columns.embedding_duplicates:EmbeddingDuplicates",
    "pair_duplicates": "stages.columns.pair_duplicates:PairDuplicates",
    "semdedup": "stages.columns.semdedup:SemDeDup",
    "clusters": "stages.columns.clusters:Clusters",
    "density_pruning": "stages.columns.density_pruning:DensityPruning",
    "clip": "stages.columns.clip:Clip",
    "tmars": "stages.columns.tmars:TMars",
    "caption_classifier": "stages.columns.caption_classifier:CaptionClassifier",
    "mix": "stages.columns.mix:Mix",
    "d2": "stages.columns.d2:D2",
    "soft_cap": "stages.columns.soft_cap:SoftCap",
    "classifier_head": "stages.columns.classifier_head:ClassifierHead",
    "negclip": "stages.columns.negclip:NegClip",
    "normsim": "stages.columns.normsim:NormSim",
    "normsim_d": "stages.columns.normsim_d:NormSimD",
    "contamination": "stages.columns.contamination:Contamination",
}


def stage_class(name: str, place: str = "stages") -> type[Stage]:
    """The class of the stage with this name. Raises ConfigError naming `place` when there is none."""
    if name not in STAGES:
        raise ConfigError(f"{place} = {name}, expected a stage.{suggestion(name, STAGES)}")
    module, _, class_name = STAGES[name].partition(":")
    return getattr(importlib.import_module(module), class_name)


def build_stage(name: str, parameters: Mapping[str, Any], place: str) -> Stage:
    """The stage with its parameters, checked against the dataclass's fields and their types.

    Raises:
        ConfigError: one line that starts with `place`: an unknown stage or parameter, a missing one, a wrong type.
    """
    import dataclasses
    from typing import get_type_hints

    import pydantic

    from pipeline.core.config import Model, validate

    kind = stage_class(name, place)
    hints = get_type_hints(kind, include_extras=True)
    fields = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(kind)
    }
    checked = validate(pydantic.create_model(kind.__name__, __base__=Model, **fields), dict(parameters), place)
    try:
        return kind(**{field: getattr(checked, field) for field in fields})
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
