"""A stream: samples in its own order, made on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from ..models.pipeline import Pipeline
from .base import FEW, TrainingData, check_skipped, encoder_of, sift
from .latents import GROUP, Sample, Size
from .options import DataOptions
from .sources import Record, Skip, Stream


class StreamData(TrainingData):
    """A stream in its own order, over and over, each record made into a sample anew: nothing is kept."""

    def __init__(
        self, source: Stream, spec: str, pipeline: Pipeline, options: DataOptions, batch_size: int, seed: int
    ) -> None:
        super().__init__(spec, options, batch_size, seed, pipeline.device)
        self.source, self.encoder = source, encoder_of(pipeline, options)
        if options.caption_drop:
            self.no_prompt = self.encoder.no_prompt()
        self._seen, self._connected = 0, False
        self._restart()
        self._advance(0)  # what is wrong with the data shows at once

    def _restart(self) -> None:
        self._number, self._stream = -1, self._batches()

    def _advance(self, number: int) -> None:
        """Read up to the batch of this number. What lies before it is read, but neither decoded nor encoded."""
        if number < self._number:
            self._restart()
        while self._number < number:
            self._size, self._records = next(self._stream)
            self._made: dict[int, list[Sample | Skip]] = {}
            self._number += 1

    def _samples(self, indices: range) -> list[Sample]:
        samples = []
        for index in indices:
            number, slot = divmod(index, self.batch_size)
            self._advance(number)
            samples.append(self._good(slot))
        return samples

    def _good(self, slot: int) -> Sample:
        """The sample in a slot of this batch or, in place of a bad one, the next of the batch."""
        for further in range(self.batch_size):
            group, position = divmod((slot + further) % self.batch_size, GROUP)
            if group not in self._made:
                records = self._records[group * GROUP : (group + 1) * GROUP]
                self._made[group] = self.encoder(records, [self._size] * len(records))
            sample = self._made[group][position]
            if not isinstance(sample, Skip):
                return sample
            if sample not in self.skipped:
                self._skip(sample)
                self._check(final=False)
        raise ValueError(f"{self.spec}: every picture of a batch is bad; the last: {self.skipped[-1]}")

    def _held_out(self, n: int) -> list[Sample]:
        square = (self.options.resolution,) * 2
        n = min(n, self.options.num_held_out)  # for more, all of the stream would be read in vain
        records = list(itertools.islice((record for record, _, held in self._usable() if held), n))
        made = self.encoder(records, [square] * len(records))
        return [one for one in made if not isinstance(one, Skip)] or [self._good(0)]

    def _usable(self) -> Iterator[tuple[Record, Size, bool]]:
        """Records that pass, their size, and whether they are held out: the second of each twenty, up to enough."""
        passed, held, position = 0, 0, 0
        for part in range(self.source.parts):
            for record in self._records_of(part):
                position += 1
                verdict = record if isinstance(record, Skip) else sift(record, self.options)
                if position > self._seen:  # not in the second pass
                    self._seen = position
                    if isinstance(verdict, Skip):
                        self._skip(verdict)
                        self._check(final=False)
                    elif isinstance(verdict, str):
                        self.filtered[verdict] = self.filtered.get(verdict, 0) + 1
                    else:
                        self.cut += self.encoder.cut([record])
                if isinstance(verdict, (Skip, str)):
                    continue
                passed += 1
                hold = passed % 20 == 2 and held < self.options.num_held_out
                held += hold
                yield record, verdict, hold
                if passed == self.options.max_samples:
                    return
        self._check(final=True)

    def _records_of(self, part: int) -> Iterator[Record | Skip]:
        """A part's records, and a Skip in place of those that a lost connection has cut off.

        Raises ConnectionError where nothing has come since the last one: then it is not the part.
        """
        try:
            for record in self.source.read(part):
                self._connected = True
                yield record
        except ConnectionError as error:
            if not self._connected:
                raise
            self._connected = False
            yield Skip(f"part {part}", str(error))

    def _batches(self) -> Iterator[tuple[Size, list[Record]]]:
        waiting: dict[Size, list[Record]] = {}
        while True:
            usable = 0
            for record, size, held in self._usable():
                if held:
                    continue
                usable += 1
                waiting.setdefault(size, []).append(record)
                if len(waiting[size]) == self.batch_size:
                    yield size, waiting.pop(size)
            if not usable:
                raise ValueError(f"{self.spec} holds nothing to train on{self._left_out() or ', which is empty'}")

    def _check(self, final: bool) -> None:
        if final or self._seen >= FEW:
            check_skipped(self.skipped, self._seen, self.options, self.spec)

    def describe(self, shown: Callable[[object], str] = str) -> str:
        return (
            f"{shown(self.spec)}: a stream of {self.source.parts} parts, read in its own order by every process and "
            f"encoded on the way, not cached (training/prepare.py does it once){self._left_out()}"
        )
