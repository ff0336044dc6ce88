# SPDX-License-Identifier: Apache-2.0
"""What runs beside the student in each step: a teacher whose insides are tapped, and the student's own earlier selves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgekd import usercode
from edgekd.domain.losses import EMA, FROZEN, LAST_EPOCH
from edgekd.kd.losses import taps
from edgekd.kd.training.dry_run import inputs_to_device, to_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor, nn

    from edgekd.domain.recipe import EntryPoint
    from edgekd.kd.training.loop import TrainingJob

_SHORTEST = 2  # steps that an average spans at least


@dataclass(slots=True)
class AuxiliaryModels:
    """The tapped teacher, and the student as it was.

    ``selves``: ``average``, a moving average of its weights over about an epoch, and ``previous``, as it was after the epoch
    before. They answer in eval mode and get no gradient.

    Source:
        Tarvainen and Valpola, arXiv 1703.01780; Kim et al., arXiv 2006.12000.
    """

    entry: EntryPoint
    tapped: taps.TappedNetworks | None = None
    selves: dict[str, nn.Module] = field(default_factory=dict)

    def answers(self, inputs: Sequence[Tensor], outputs: Tensor | None, epoch: int) -> dict[str, Tensor | None]:
        """Return what each teacher of ``domain.losses.TEACHERS`` says to a batch, None where it says nothing (yet)."""
        import torch

        found = {FROZEN: outputs, EMA: None, LAST_EPOCH: None}
        with torch.no_grad():
            for name, module in self.selves.items():
                if name != LAST_EPOCH or epoch > 0:
                    found[name] = usercode.call_user_code(module.eval(), self.entry, *inputs)
        return found

    def loss(self, inputs: Sequence[Tensor], epoch: int) -> Tensor | float:
        """Return the losses of the tapped tensors for the batch that the student has just seen; 0 if nothing is tapped."""
        if self.tapped is None or not self.tapped.counts_in(epoch):
            return 0.0
        self.tapped.ask(inputs)
        return self.tapped.loss(epoch)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained beside the student."""
        return [] if self.tapped is None else list(self.tapped.adapters.parameters())

    def after_step(self, module: nn.Module) -> None:
        """Let the average follow the student."""
        self._follow(EMA, module)

    def after_epoch(self, module: nn.Module) -> None:
        """Let the previous self be the student as it is now."""
        self._follow(LAST_EPOCH, module)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        adapters = {} if self.tapped is None else self.tapped.adapters.state_dict()
        return {"adapters": adapters, "selves": {name: module.state_dict() for name, module in self.selves.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        if self.tapped is not None:
            self.tapped.adapters.load_state_dict(state["adapters"])
        for name, module in self.selves.items():
            module.load_state_dict(state["selves"][name])

    def _follow(self, name: str, module: nn.Module) -> None:
        if name in self.selves:
            self.selves[name].update_parameters(module)  # type: ignore[operator]  # an AveragedModel has it


def auxiliary_models(job: TrainingJob, module: nn.Module, layout: torch.memory_format) -> AuxiliaryModels:
    """Return what a job has run beside a student.

    Raises:
        RecipeError: if taps do not fit.
    """
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from edgekd.kd.training.dry_run import DRY_RUN_SAMPLES

    steps = max(_SHORTEST, len(job.train) // job.settings.batch_size)
    decay = {EMA: 1 - 1 / steps, LAST_EPOCH: 0.0}
    # copied before hooks are put on the student, which they would share
    selves = {name: AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay[name]), use_buffers=True) for name in job.selves}  # type: ignore[no-untyped-call]  # torch's own
    for one in selves.values():
        one.requires_grad_(requires_grad=False)
    found = AuxiliaryModels(job.entry, None, dict(selves))
    if job.teacher is not None:
        teacher = job.teacher()
        to_device(teacher.module, layout, job.settings.mode, job.section)
        batch = job.train.pick(torch.arange(min(DRY_RUN_SAMPLES, len(job.train))))
        student = taps.Network("student", module, job.entry)
        inputs = inputs_to_device(batch.inputs, layout, job.settings.mode)
        found.tapped = taps.attach_taps(student, teacher, job.tapped, inputs, job.settings.seed)
    return found
