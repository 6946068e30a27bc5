"""A run from beginning to end on the host: drawing, steps, previews, autosaves, and every way to stop."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..announce import show, tell, warn
from ..catalogue import in_host_names
from ..host import ProgressBar, Vae
from .files import Autosave
from .host import NAME, HostUNet
from .pictures import STUDENT_STEPS, TEACHER_STEPS, sheet, student_latents, teacher_latents, to_images
from .run import Run

PREVIEWS = 2  # pictures of the live preview
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_INTERRUPTED = comfy.model_management.InterruptProcessingException


@dataclass
class Work:
    """preview_every, autosave_every: in steps; 0 for no previews."""

    run: Run
    method: Autosave
    finish: Autosave | None
    vae: Vae | None
    shape: tuple[int, int, int]  # of the pictures that are shown
    preview_every: int
    autosave_every: int
    saved: tuple[int, str] | None = None  # step and role of the last autosave
    teacher: list[Image.Image] = field(default_factory=list)  # the teacher's pictures of the preview, drawn once

    @property
    def host(self) -> HostUNet:
        return self.run.host

    @property
    def autosave(self) -> Autosave:
        """Of the stage that the run is in; the method's stays as it was when a finish began."""
        return self.finish if self.finish and self.run.finishing else self.method

    def go_on(self) -> None:
        """Takes up the state of this run, of its finish rather than its method. Raises ValueError for a damaged one."""
        if not (self.finish and self.finish.go_on(self.run)):
            self.method.go_on(self.run)

    def all_steps(self) -> str:
        """All steps; the role to hand on: "target", or "release" if that is nearer to the teacher.

        Raises the host's InterruptProcessingException when it was cancelled and ValueError without memory, both after
        an autosave; and what `Run.advance` raises.
        """
        run = self.run
        bar = comfy.utils.ProgressBar(run.last_step)
        bar.update_absolute(run.step)
        try:
            with self._explained():
                self._steps(bar)
                role = self._better()
                self._save(role)
                self._preview(bar, role)
        except _INTERRUPTED:
            self._keep()
            kept = (
                f", kept in {self.autosave.name}. Queue the same graph to go on." if run.step else ", before the first."
            )
            tell(f"{NAME}: stopped at step {run.step} of {run.last_step}{kept}")
            raise
        tell(f"{NAME}: {run.step} steps, loss {run.losses[-1]:.4g}; also kept in {self.autosave.name}")
        return role

    def _steps(self, bar: ProgressBar) -> None:
        run, every = self.run, self.preview_every
        progress = tqdm(total=run.last_step, initial=run.step, desc=NAME, mininterval=1)
        pace, shown = None, 0.0
        with contextlib.closing(progress):
            self._read()
            if every:
                self._preview(bar)
            while not run.is_done:
                if run.method_is_done:
                    self._save(self._better())
                    pace = None  # steps of the finish take longer
                if not run.method_is_done and not run.finishing:  # whose pictures are the student's own
                    self._draw(run.samples.numbers(run.next_indices()))
                since = time.monotonic()
                loss = self._step()
                took = time.monotonic() - since
                pace = took if pace is None else 0.9 * pace + 0.1 * took
                left = pace * (run.last_step - run.step)
                progress.update()
                progress.set_postfix_str(f"loss {loss:.4f}")
                bar.update_absolute(run.step)
                if time.monotonic() - shown > 1 or run.is_done:
                    shown = time.monotonic()
                    stage = ", distribution matching" if run.finishing else ""
                    show(f"step {run.step} of {run.last_step}{stage}, loss {loss:.4g}, {_duration(left)} left")
                if run.step % self.autosave_every == 0:
                    self._save("target")
                if every and run.step % every == 0 and not run.is_done:
                    self._preview(bar)

    def _step(self) -> float:
        settings = self.run.settings
        self.host.load((settings.batch_size, *self.shape))
        with self.host.differentiable(self.run.adapters):
            return self.run.advance()

    def _read(self) -> None:
        """Has the text encoder read all prompts of the run before the UNet is on its device."""
        samples, since = self.run.samples, time.monotonic()
        for done, number in enumerate(samples.used(self.run.last_step * len(self.run.next_indices()))):
            samples.of(number)
            comfy.model_management.throw_exception_if_processing_interrupted()
            if time.monotonic() - since > 1:
                since = time.monotonic()
                show(f"reading prompts: {done + 1}")

    def _draw(self, numbers: Sequence[int]) -> None:
        """Has the teacher draw what is missing of these samples."""
        samples = self.run.samples
        for number in numbers:
            samples.of(number)
        for group in samples.missing(numbers):
            for number in samples.group(group):
                samples.of(number)
            show(f"the teacher draws pictures to learn from: {len(samples.drawn)} so far")
            self.host.load((8, *self.shape))
            with self.host.differentiable(None):
                samples.draw(group)
            comfy.model_management.throw_exception_if_processing_interrupted()

    def _better(self) -> str:
        """Which average is nearer to the teacher on held-out samples."""
        run = self.run
        if "release" not in run.adapters.weights or not run.settings.recipe.release_decay or not run.step:
            return "target"
        run.adapters.weights["release"] = {
            key: one.to(self.host.device) for key, one in run.adapters.weights["release"].items()
        }
        errors = self.errors(("target", "release"))
        logging.info("%s: endpoint error of the averages: %s", NAME, errors)
        return min(errors, key=lambda role: errors[role])

    def errors(self, roles: tuple[str, ...]) -> dict[str, float]:
        """The endpoint errors of these roles ("teacher": of the model before the distillation)."""
        self._draw(self.run.judged)
        self.host.load((2, *self.shape))
        with self.host.differentiable(self.run.adapters):
            return self.run.endpoint_errors(roles)

    def latents(self, role: str, steps: int, count: int = PREVIEWS) -> torch.Tensor:
        """A role's latents for the first held-out prompts, from seeds 0, 1, ..; "teacher" with guidance."""
        run, samples = self.run, self.run.samples
        told = [samples.of(number) for number in samples.held[:count]]
        self.host.load((2, *self.shape))
        with self.host.differentiable(run.adapters), run.adapters.use(role):
            if role == "teacher":
                scale = run.settings.recipe.guidance_scale
                return teacher_latents(self.host, told, samples.nothing, self.shape, scale, steps)
            return student_latents(self.host, run.objective.denoiser, told, self.shape, steps)

    def picture(self, role: str) -> Image.Image:
        """Teacher beside student, with the loss so far."""
        run = self.run
        if not self.teacher:
            self.teacher = to_images(self.host, self.vae, self.latents("teacher", TEACHER_STEPS))
        student = to_images(self.host, self.vae, self.latents(role, STUDENT_STEPS))
        columns = [(f"teacher, {TEACHER_STEPS} steps", self.teacher), (f"student, {STUDENT_STEPS} steps", student)]
        said = f"step {run.step}" + (f", loss {run.losses[-1]:.4g}" if run.losses else "")
        return sheet(columns, [said], run.losses)

    def _preview(self, bar: ProgressBar, role: str = "target") -> None:
        bar.update_absolute(self.run.step, preview=("JPEG", self.picture(role), 1024))

    def _keep(self) -> None:
        """An autosave of what no other holds."""
        if self.saved is None or self.saved[0] != self.run.step:
            self._save("target")

    def _save(self, role: str) -> None:
        """An autosave, or a warning where none can be written: the run goes on, and the last one stays."""
        if self.saved == (self.run.step, role) or self.run.step == 0:
            return
        try:
            self.autosave.save(self.run, role)
            self.saved = (self.run.step, role)
        except (OSError, SafetensorError) as error:
            warn(
                f"{NAME}: the autosave of step {self.run.step} could not be written ({in_host_names(str(error))}). The "
                "run goes on; make room on the disk of output/ for the next one."
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises ValueError, after an autosave, for what is raised when memory is at an end."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            short = isinstance(error, (comfy.model_management.OOM_EXCEPTION, MemoryError))
            if not short and not any(sign in str(error).lower() for sign in NO_MEMORY):
                raise
            settings = self.run.settings
            reason = (str(error).splitlines() or ["no more memory"])[0][:200]
        else:
            return
        comfy.model_management.soft_empty_cache()
        self._keep()
        ways = [f"batch_size (it is {settings.batch_size}; gradient_accumulation makes up for it)"]
        ways = ways if settings.batch_size > 1 else []
        ways += ["finish_steps (0 takes the least)"] if self.run.finishing else []
        raise ValueError(
            f"{NAME}: out of memory at step {self.run.step + 1} ({reason}). Lower "
            f"{', then '.join([*ways, 'resolution', f'rank (it is {settings.rank})'])}; what was learned is kept."
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
