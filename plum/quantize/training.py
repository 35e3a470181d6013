"""Training of an RQ-VAE: on one process or several, stopped and resumed without a trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plum.errors import InvalidArgument, check_int, check_number
from plum.quantize.checkpoint import TrainingState, fingerprint, load_checkpoint, save_checkpoint
from plum.quantize.distributed import (
    copy_from_first,
    gather_with_gradient,
    rank,
    reduce_gradients,
    sum_over_ranks,
    world_size,
)
from plum.quantize.inputs import check_embeddings, check_present
from plum.quantize.losses import co_occurrence_loss
from plum.quantize.partners import Partners
from plum.quantize.residual_quantizer import memory_for
from plum.quantize.rqvae import RQVAE, RQVAEConfig

# Rows a codeword for the k-means start: more change the centroids little and cost much.
_ROWS_PER_CODE = 256
_CHUNK = 65536
# A level that uses less than this of its codes has lost some; above it, uniqueness decides.
_FULL_USAGE = 0.95
# Streams of random numbers, apart from those of the quantizer, which has the same seed.
_EPOCH, _SAMPLE = range(100, 102)


@torch.inference_mode(False)
def fit_rqvae(
    embeddings: Mapping[str, Tensor],
    config: RQVAEConfig,
    *,
    present: Mapping[str, Tensor] | None = None,
    pairs: Tensor | None = None,
    epochs: int = 100,
    warmup_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 2e-3,
    weight_decay: float = 1e-4,
    kmeans_init: bool = True,
    evaluate_every: int = 5,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RQVAE, list[dict[str, Any]]]:
    """Trains an RQ-VAE and keeps the best of the states it evaluates.

    The first ``warmup_epochs`` train the autoencoder without quantization; then the codebooks
    start as k-means centroids of the latents, and everything trains together with AdamW and a
    cosine decay of the learning rate to zero.

    With ``pairs``, each item of a batch brings one of its partners along, drawn anew every epoch,
    and ``config.co_occurrence_weight`` times the co-occurrence loss is added.

    Every ``evaluate_every`` epochs the whole catalog is encoded as at inference. Of two states the
    better one is the one whose least used level uses more of its codes, up to 95 %; then the one
    with the larger ``unique_sid_ratio - unexplained_variance``, so that a percent of unique SIDs
    weighs as much as a percent of the variance of the embeddings.

    Everything random derives from ``config.seed`` and the epoch, so a training that was stopped and
    is started again with the same arguments ends with the same bits as one that was not.

    Under ``torch.distributed`` all processes call this with the same arguments, the whole catalog
    included; each takes its share of every batch, and all end with the same bits. One process alone
    differs by the rounding of a sum of gradients, about 1e-7 a step: the same SIDs for some dozens
    of steps, until AdamW has enlarged it, an item stood between two codes or a dead code was
    revived, which is drawn by the bits of the residuals; from then on it is another run of the same
    quality. Progressive masking draws its prefixes on each process, and is another run at once.

    Args:
        embeddings: Modality to floating-point ``[N, D_m]``, finite; rows of missing items hold
            anything finite.
        config: The shape of the model.
        present: Modality to bool ``[N]``, the items that have it; None for all.
        pairs: int64 ``[P, 2]``, items that are taken together, from *training* data only, as of
            :func:`plum.data.co_occurring_pairs`; needs ``config.co_occurrence_weight > 0``.
        epochs: Passes over the items, warm-up included.
        warmup_epochs: Passes before the codebooks start, less than ``epochs``; None for a tenth, at
            least one if there are two.
        batch_size: Items a step, of all processes together and without partners; None for an
            eighth of the items, but 32 to 512.
        lr: Learning rate at the start.
        weight_decay: AdamW's weight decay of the networks; codebooks have none.
        kmeans_init: Start the codebooks as k-means centroids; False leaves them random normal, for
            comparison.
        evaluate_every: Epochs between evaluations; the last epoch is always evaluated.
        patience: Stop after this many evaluations in a row without a better state; None never
            stops early.
        checkpoint: Folder that holds the state of the training after each evaluation. If it is
            there already, the training goes on from it, or returns at once if it was finished. One
            that all processes see; the first one writes.
        progress: Called as ``progress(done, epochs)`` after each epoch.

    Returns:
        The model, in evaluation mode, and one record an epoch: ``epoch``, ``loss``, each loss,
        ``training_usage`` (share of the codes that the epoch's batches used, per level), and where
        it was evaluated ``usage`` (the same of the whole catalog), ``unique_sid_ratio`` (SIDs per
        item), ``unexplained_variance`` (mean over the modalities) and ``best``.

    Raises:
        InvalidArgument: an argument is out of range, embeddings hold NaN or infinity (the rows are
            named), or the loss diverged.
        InvalidData: the checkpoint is damaged, or of another training.
    """
    count = check_embeddings(embeddings, config.input_dims)
    check_present(present, embeddings, count)
    # Whatever made them is not trained.
    embeddings = {name: x.detach() for name, x in embeddings.items()}
    epochs = check_int("epochs", epochs)
    if warmup_epochs is None:
        # Codebooks of an untrained encoder are left behind when it learns.
        warmup_epochs = min(max(epochs // 10, 1), epochs - 1)
    warmup_epochs = check_int("warmup_epochs", warmup_epochs, 0, epochs - 1)
    batch_size = min(max(count // 8, 32), 512) if batch_size is None else batch_size
    at_least_one = {"batch_size": batch_size, "evaluate_every": evaluate_every}
    at_least_one |= {} if patience is None else {"patience": patience}
    for name, value in at_least_one.items():
        check_int(name, value)
    check_number("lr", lr, "a positive number", lambda lr: 0 < lr < math.inf)
    check_number("weight_decay", weight_decay, "a number >= 0", lambda each: 0 <= each < math.inf)
    if (pairs is None) != (config.co_occurrence_weight == 0):
        expected = "pairs together with a co_occurrence_weight above 0, or neither"
        got = "none" if pairs is None else f"{len(pairs)} pairs"
        raise InvalidArgument("pairs", expected, f"{got}, weight {config.co_occurrence_weight}")
    partners = None if pairs is None else Partners(pairs, count)
    steps = (epochs - warmup_epochs) * -(-count // batch_size)
    for name, value in memory_for(steps, batch_size, config.codebook_sizes).items():
        if getattr(config, name) is None:
            config = dataclasses.replace(config, **{name: value})
    settings = {
        **dataclasses.asdict(config),
        **{"epochs": epochs, "warmup_epochs": warmup_epochs, "batch_size": batch_size, "lr": lr},
        **{"weight_decay": weight_decay, "kmeans_init": kmeans_init},
        **{"evaluate_every": evaluate_every, "patience": patience},
    }
    device = next(iter(embeddings.values())).device
    model = RQVAE(config).to(device)
    optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), lr=lr, fused=True)
    model.quantizer.attach_optimizer(optimizer)
    state, stamp = TrainingState(), {}
    if checkpoint is not None:
        inputs = {f"embeddings/{name}": x for name, x in embeddings.items()}
        inputs |= {f"present/{name}": mask for name, mask in (present or {}).items()}
        inputs |= {} if pairs is None else {"pairs": pairs}
        stamp = fingerprint(settings, inputs)
        state = load_checkpoint(Path(checkpoint), stamp, model, optimizer)
    if state.epoch == 0:
        model.fit_inputs(embeddings, present)
        copy_from_first([p.detach() for p in model.parameters()], None)
    training = _Training(model, optimizer, embeddings, present, partners, batch_size)
    while state.epoch < epochs and not _stalled(state.history, patience):
        epoch = state.epoch
        quantize = epoch >= warmup_epochs
        if epoch == warmup_epochs and kmeans_init:
            training.start_codebooks()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        record: dict[str, Any] = {"epoch": epoch + 1, **training.run_epoch(epoch, quantize)}
        due = (epoch + 1) % evaluate_every == 0 or epoch == epochs - 1
        if quantize and due:
            measured = _evaluate(model.eval(), embeddings, present)
            ranked = _rank(measured, count, config.codebook_sizes)
            record.update(measured, best=state.best_rank is None or ranked > state.best_rank)
            if record["best"]:
                state.best_rank, state.best = ranked, _weights(model)
        state.history.append(record)
        state.epoch += 1
        if checkpoint is not None and due:
            model.quantizer.share_sample()
            if rank(None) == 0:
                save_checkpoint(Path(checkpoint), stamp, state, model, optimizer)
        if progress is not None:
            progress(epoch + 1, epochs)
    model.load_state_dict(state.best)
    model.quantizer.forget_sample()
    model.history = state.history
    return model.eval(), state.history


class _Training:
    """The steps of one training, each on this process's share of a batch."""

    def __init__(
        self,
        model: RQVAE,
        optimizer: torch.optim.Optimizer,
        embeddings: Mapping[str, Tensor],
        present: Mapping[str, Tensor] | None,
        partners: Partners | None,
        batch_size: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.embeddings = embeddings
        self.present = present
        self.partners = partners
        self.batch_size = batch_size
        self.count = len(next(iter(embeddings.values())))
        self.device = next(model.parameters()).device
        groups = [group["params"] for group in optimizer.param_groups]
        self.parameters, self.networks = [p for group in groups for p in group], groups[0]

    def start_codebooks(self) -> None:
        """Sets the codebooks to k-means centroids of the latents."""
        config = self.model.config
        limit = _ROWS_PER_CODE * max(config.codebook_sizes)
        draw = _generator(config.seed, _SAMPLE)
        sample = torch.randperm(self.count, generator=draw, device="cpu")[:limit]
        inputs, masks = _rows(self.embeddings, self.present, sample.to(self.device))
        # Products round by their shape, and k-means would end elsewhere: all compute all rows.
        latents = self.model.eval().latents(inputs, masks)
        self.model.quantizer.init_codebooks(latents.tensor_split(world_size(None))[rank(None)])

    def run_epoch(self, epoch: int, quantize: bool) -> dict[str, Any]:
        """Trains on every item once; returns the mean losses and, quantized, the usage."""
        config = self.model.config
        generator = _generator(config.seed, _EPOCH, epoch)
        self.model.train()
        totals: dict[str, Tensor] = {}
        usage = torch.zeros(sum(config.codebook_sizes), dtype=torch.int64, device=self.device)
        order = torch.randperm(self.count, generator=generator, device="cpu")
        for items in order.split(self.batch_size):
            for name, loss in self._step(items, generator, quantize, usage).items():
                totals[name] = totals.get(name, 0.0) + loss * (len(items) / self.count)
        record: dict[str, Any] = {name: float(total) for name, total in totals.items()}
        if quantize:
            (counts,) = sum_over_ranks([usage], None)
            used = (counts > 0).double().split(config.codebook_sizes)
            record["training_usage"] = [float(level.mean()) for level in used]
        return record

    def _step(
        self, items: Tensor, generator: torch.Generator, quantize: bool, usage: Tensor
    ) -> dict[str, Tensor]:
        """Makes one step; returns the losses of the whole batch and adds to ``usage``."""
        config, world = self.model.config, world_size(None)
        places = None
        if self.partners is not None:
            items, places = self.partners.batch(items, generator)
        shares = items.tensor_split(world)
        own = shares[rank(None)].to(self.device)
        output = self.model(*_rows(self.embeddings, self.present, own), quantize=quantize)
        if output.quantizer is not None:
            usage += output.quantizer.usage
        # Each loss is a mean over the rows here; times its share it adds up to that of the batch.
        losses = {
            name: loss * self._share(name, own, items) for name, loss in output.losses.items()
        }
        total = torch.stack(list(losses.values())).sum()
        if places is not None:
            assert self.model.head is not None
            fused = output.latents if output.quantizer is None else output.quantizer.quantized
            start = sum(map(len, shares[: rank(None)]))
            projections = gather_with_gradient(self.model.head(fused), start, None)
            contrast = config.co_occurrence_weight * co_occurrence_loss(
                projections,
                items.to(self.device),
                places.to(self.device),
                temperature=config.temperature,
            )
            total = total + contrast
            # Every process has the loss of the whole batch.
            losses["co_occurrence"] = contrast / world
        self.optimizer.zero_grad()
        total.backward()
        values = torch.stack(list(losses.values())).detach()
        # Before codes are used the codebooks have no gradient, on any process, and no step.
        trained = self.parameters if quantize else self.networks
        values = reduce_gradients(trained, values, None)
        loss = values.sum()
        if not bool(loss.isfinite()):
            lr = self.optimizer.param_groups[0]["lr"]
            raise InvalidArgument("lr", "a rate that keeps the loss finite", lr, "lower it")
        self.optimizer.step()
        return {"loss": loss, **dict(zip(losses, values.unbind(), strict=True))}

    def _share(self, name: str, own: Tensor, items: Tensor) -> float:
        """Returns the share of the batch's rows behind a loss that are of this process."""
        if world_size(None) == 1:
            return 1.0
        mask = None if self.present is None else self.present.get(name.partition("/")[2])
        if mask is None:
            return len(own) / len(items)
        return int(mask[own].sum()) / max(int(mask[items.to(mask.device)].sum()), 1)


def _stalled(history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Says whether the last ``patience`` evaluations brought nothing better."""
    verdicts = [record["best"] for record in history if "best" in record]
    return patience is not None and len(verdicts) > patience and not any(verdicts[-patience:])


def _weights(model: RQVAE) -> dict[str, Tensor]:
    """Returns a copy of the state without the sample for revival, which only training needs."""
    state = model.state_dict()
    sample = "quantizer.reservoir_"
    return {name: value.clone() for name, value in state.items() if not name.startswith(sample)}


@torch.no_grad()
def _evaluate(
    model: RQVAE, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    """Encodes and decodes the whole catalog as at inference and measures the result."""
    count = len(next(iter(embeddings.values())))
    codes, errors = [], dict.fromkeys(embeddings, 0.0)
    variances = dict.fromkeys(embeddings, 0.0)
    for start in range(0, count, _CHUNK):
        inputs, masks = _rows(embeddings, present, slice(start, start + _CHUNK))
        codes.append(model.encode(inputs, masks))
        for name, decoded in model.decode(codes[-1]).items():
            x = inputs[name]
            if masks is not None and name in masks:
                x, decoded = x[masks[name]], decoded[masks[name]]
            errors[name] += _squared_norm(decoded - x)
            variances[name] += _squared_norm(x - model.scaling_of(name).center)
    table = torch.cat(codes)
    sizes = model.config.codebook_sizes
    # Of a constant modality there is nothing to explain.
    unexplained = [errors[m] / variances[m] if variances[m] > 0 else 0.0 for m in errors]
    figures = [
        *(len(table[:, level].unique()) / size for level, size in enumerate(sizes)),
        len(table.unique(dim=0)) / count,
        sum(unexplained) / len(unexplained),
    ]
    # All processes must draw the same conclusions, to the last bit.
    agreed = torch.tensor(figures, dtype=torch.float64, device=table.device)
    copy_from_first([agreed], None)
    *usage, unique, lost = agreed.tolist()
    return {"usage": usage, "unique_sid_ratio": unique, "unexplained_variance": lost}


def _squared_norm(x: Tensor) -> float:
    """Returns the sum of squares, added up and squared in fp64: in fp32 they leave its range."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _rank(measured: Mapping[str, Any], count: int, sizes: Sequence[int]) -> tuple[float, float]:
    """Orders evaluated states as :func:`fit_rqvae` promises; higher is better."""
    # With fewer items than codes, no state can use them all.
    usage = min(
        used * size / min(size, count) for used, size in zip(measured["usage"], sizes, strict=True)
    )
    return min(usage, _FULL_USAGE), measured["unique_sid_ratio"] - measured["unexplained_variance"]


def _rows(
    embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None, rows: Tensor | slice
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    inputs = {name: x[rows] for name, x in embeddings.items()}
    return inputs, None if present is None else {name: m[rows] for name, m in present.items()}


def _parameter_groups(model: RQVAE, weight_decay: float) -> list[dict[str, Any]]:
    books = [p for p in model.quantizer.parameters() if p.requires_grad]
    ours = {id(p) for p in books}
    nets = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    return [
        {"params": nets, "weight_decay": weight_decay},
        {"params": books, "weight_decay": 0.0},
    ]


def _generator(*stream: int) -> torch.Generator:
    seed = int(np.random.SeedSequence(stream).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)
