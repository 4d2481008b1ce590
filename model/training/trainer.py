"""Training steps of one process, alone or data-parallel with others.

Owns: gradients, their sum over processes, the update, balancing of the gates, and the state that resumes exactly.
Must not know: how processes are started, progress bars, the published file format.
Source: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2 for the bias update.
"""

import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.parameters import named_tensors
from model.tokenizer import Tokenizer
from model.training.network import Network, initial_weights
from model.training.optimizer import Optimizer
from model.training.samples import draw_batch
from model.training.settings import TrainingSettings

# Updated by Adam although they are matrices: their rows are independent vectors, one per token or expert.
_NOT_MATRICES = ("embedding", "lm_head", "gate")


class ResumeError(ValueError):
    """A saved state belongs to another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step measured, over all shards."""

    step: int
    loss: float  # nats per learned token
    mtp_loss: float
    num_tokens: int
    max_load: float  # the busiest expert's share over the mean share, worst layer


class Trainer:
    """One process's view of a run. Every process holds the same weights after every step."""

    def __init__(self, config: ModelConfig, settings: TrainingSettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._config = config
        self._tokenizer = tokenizer
        self.weights = initial_weights(config, settings.seed)
        self.network = Network(config, self.weights)
        self._tensors = {name: tensor for name, tensor in named_tensors(self.weights) if tensor.requires_grad}
        self._gates = [tensor for name, tensor in named_tensors(self.weights) if name.endswith("gate_bias")]
        matrices = {n for n, t in self._tensors.items() if t.ndim >= 2 and n.rsplit(".", 1)[-1] not in _NOT_MATRICES}
        self._optimizer = Optimizer(self._tensors, matrices=matrices, weight_decay=settings.weight_decay)
        self.step = 0
        self.history: list[dict[str, Any]] = []  # a StepReport per step
        self.accuracies: list[dict[str, Any]] = []  # of the process that measures them

    @property
    def settings_as_dict(self) -> dict[str, Any]:
        return asdict(self._settings)

    @property
    def is_finished(self) -> bool:
        return self.step >= self._settings.num_steps

    def run_step(self, *, wants_stop: bool = False) -> tuple[StepReport, bool]:
        """Compute this process's shards, sum with the others, update. Second: whether any process wants to stop."""
        settings, rank, world = self._settings, _rank(), _world()
        total: Tensor | None = None
        for shard in range(rank, settings.num_shards, world):
            part = self._shard(shard)
            total = part if total is None else total + part
        assert total is not None, "more processes than shards"
        total = torch.cat([total, torch.tensor([float(wants_stop)])])
        if world > 1:
            dist.all_reduce(total)
        report, stop = self._apply(total), bool(total[-1] > 0)
        self.history.append(asdict(report))
        self.step += 1
        return report, stop

    def _shard(self, shard: int) -> Tensor:
        """Everything of one shard that is summed: gradients, losses, token count, experts' counts."""
        s = self._settings
        batch = draw_batch(
            s.seed, self.step, shard, self._tokenizer, num_tokens=s.tokens_per_shard, max_tokens=s.max_sample_tokens
        )
        with torch.autocast("cpu", torch.bfloat16):
            losses = self.network.losses(batch)
            objective = losses.next_token + s.mtp_weight * losses.mtp
        gradients = torch.autograd.grad(objective, list(self._tensors.values()))
        figures = torch.stack(
            [losses.next_token.detach(), losses.mtp.detach(), torch.tensor(float(len(batch.token_ids)))]
        )
        return torch.cat([*(g.flatten() for g in gradients), figures, losses.expert_counts.flatten().float()])

    def _apply(self, total: Tensor) -> StepReport:
        settings = self._settings
        sizes = [tensor.numel() for tensor in self._tensors.values()]
        *flat, figures, counts, _ = total.split_with_sizes(
            [*sizes, 3, len(self._gates) * self._config.n_routed_experts, 1]
        )
        norm = total[: sum(sizes)].norm() / settings.num_shards
        scale = min(1.0, settings.gradient_clip / (float(norm) + 1e-12)) / settings.num_shards
        pairs = zip(self._tensors.items(), flat, strict=True)
        gradients = {name: piece.view_as(tensor) * scale for (name, tensor), piece in pairs}
        rate = settings.rate(self.step)
        self._optimizer.step(gradients, muon_rate=settings.muon_rate * rate, adam_rate=settings.adam_rate * rate)
        loads = counts.view(len(self._gates), -1)
        mean = loads.mean(dim=1, keepdim=True)
        for gate, load, even in zip(self._gates, loads, mean, strict=True):
            gate += settings.balance_rate * torch.sign(even - load)
        return StepReport(
            step=self.step,
            loss=float(figures[0]) / settings.num_shards,
            mtp_loss=float(figures[1]) / settings.num_shards,
            num_tokens=int(figures[2]),
            max_load=float((loads / mean).max()),
        )

    def save(self, path: Path) -> None:
        """Write the whole state; a reader sees the old file or the new one."""
        state = {
            "settings": asdict(self._settings),
            "config": self._config.to_dict(),
            "vocabulary": self._tokenizer.digest,
            "step": self.step,
            "history": self.history,
            "accuracies": self.accuracies,
            "weights": {name: tensor.detach() for name, tensor in named_tensors(self.weights)},
            "optimizer": self._optimizer.state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Continue from a state of the same settings, shape and vocabulary. Raises ResumeError for another run's, and
        for a file that holds no state."""
        try:
            state = torch.load(path, weights_only=True)
            saved_settings, saved_config, vocabulary = state["settings"], state["config"], state["vocabulary"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ResumeError(f"{path}: not the state of a run: {' '.join(str(error).split())[:200]}") from None
        for name, value in asdict(self._settings).items():
            if saved_settings.get(name) != value:
                raise ResumeError(f"{path}: {name} was {saved_settings.get(name)}, now {value}")
        if saved_config != self._config.to_dict():
            raise ResumeError(f"{path}: belongs to a model of another shape")
        if vocabulary != self._tokenizer.digest:
            raise ResumeError(f"{path}: its tokens are of another vocabulary, the problems or their words have changed")
        with torch.no_grad():
            for name, tensor in named_tensors(self.weights):
                tensor.copy_(state["weights"][name])
        self._optimizer.restore(state["optimizer"])
        self.step, self.history, self.accuracies = state["step"], state["history"], state["accuracies"]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
