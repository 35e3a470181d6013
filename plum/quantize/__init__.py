"""Vector quantization: from item embeddings to codes."""

from plum.quantize.balanced import balanced_codes
from plum.quantize.beam import beam_encode
from plum.quantize.kmeans import KMeans
from plum.quantize.losses import (
    QuantizationLosses,
    co_occurrence_loss,
    quantization_losses,
    reconstruction_loss,
)
from plum.quantize.residual_quantizer import QuantizerOutput, ResidualQuantizer
from plum.quantize.residual_vq import ResidualVQ
from plum.quantize.rq_kmeans import RQKMeans, fit_rq_kmeans
from plum.quantize.rqvae import RQVAE, RQVAEConfig, RQVAEOutput
from plum.quantize.rvq import RVQ, fit_rvq
from plum.quantize.tokenizer import (
    Tokenizer,
    fit_tokenizer,
    load_tokenizer,
    multi_resolution_sizes,
)
from plum.quantize.training import fit_rqvae

__all__ = [
    "RQVAE",
    "RVQ",
    "KMeans",
    "QuantizationLosses",
    "QuantizerOutput",
    "RQKMeans",
    "RQVAEConfig",
    "RQVAEOutput",
    "ResidualQuantizer",
    "ResidualVQ",
    "Tokenizer",
    "balanced_codes",
    "beam_encode",
    "co_occurrence_loss",
    "fit_rq_kmeans",
    "fit_rqvae",
    "fit_rvq",
    "fit_tokenizer",
    "load_tokenizer",
    "multi_resolution_sizes",
    "quantization_losses",
    "reconstruction_loss",
]
