"""Training samples by index, from any kind of data, and the random numbers that go with an index.

Sample i of a run is a function of the data, the options, the batch size and the seed alone: the same whatever the
number of processes, and the same after a resume.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..models.pipeline import Pipeline
from ..models.teachers import EMBEDDED
from ..scenes.emoji import IMAGE_SIZE, draw_caption, scene
from .base import TrainingData
from .latents import META
from .options import DataOptions, at_resolution
from .samples import PROMPTS, PreparedData, RecordData
from .sources import Lazily, Listing, Record, Source, Stream, digest, open_source
from .streams import StreamData

__all__ = ["DataOptions", "TrainingData", "at_resolution", "default_spec", "open_data", "source_of"]


def open_data(spec: str | None, pipeline: Pipeline, options: DataOptions, batch_size: int, seed: int) -> TrainingData:
    """The training data that `spec` names, or, for None, what suits the teacher: see docs/data.md.

    batch_size: of all processes together. Raises FileNotFoundError for data that are not there, ValueError for data
    that are of no use (too many bad ones; a cache of another teacher), naming them.
    """
    options = at_resolution(options, pipeline)
    spec = spec or default_spec(pipeline)
    if (Path(spec) / META).is_file():
        return PreparedData(Path(spec), pipeline, options, batch_size, seed)
    source = source_of(spec, options, seed)
    kind = StreamData if isinstance(source, Stream) else RecordData
    return kind(source, spec, pipeline, options, batch_size, seed)


def default_spec(pipeline: Pipeline) -> str:
    """'embedded' for the embedded teacher; the shipped list of prompts for any other."""
    return "embedded" if pipeline.source in ("embedded", "embedded-teacher", str(EMBEDDED)) else str(PROMPTS)


def source_of(spec: str, options: DataOptions, seed: int = 0) -> Source:
    """The records that `spec` names; 'embedded' is the scenes of stream `seed`, with the held-out ones at their end."""
    if spec == "embedded":
        return scenes(seed, options.num_scenes + options.num_held_out)
    return open_source(
        spec,
        options.caption_column,
        options.image_column,
        options.dataset_config,
        options.dataset_split,
        options.streaming,
        options.images_per_prompt,
    )


def scenes(seed: int, count: int) -> Listing:
    """The first scenes of a stream as records."""

    def record(index: int) -> Record:
        caption = str(draw_caption(np.random.default_rng([seed, index])))
        return Record(f"scene {index}", caption, lambda: scene(seed, index)[0], size=(IMAGE_SIZE, IMAGE_SIZE))

    return Listing(Lazily(count, record), digest("scenes", seed, count), shuffled=True)
