"""Vector quantization: from item embeddings to codes."""

from plum.quantize.beam import beam_encode
from plum.quantize.kmeans import KMeans
from plum.quantize.losses import QuantizationLosses, quantization_losses, reconstruction_loss
from plum.quantize.residual_quantizer import QuantizerOutput, ResidualQuantizer
from plum.quantize.residual_vq import ResidualVQ
from plum.quantize.rq_kmeans import RQKMeans, fit_rq_kmeans
from plum.quantize.rqvae import RQVAE, RQVAEConfig, RQVAEOutput
from plum.quantize.training import Tokenizer, fit_rqvae, fit_tokenizer, load_tokenizer

__all__ = [
    "RQVAE",
    "KMeans",
    "QuantizationLosses",
    "QuantizerOutput",
    "RQKMeans",
    "RQVAEConfig",
    "RQVAEOutput",
    "ResidualQuantizer",
    "ResidualVQ",
    "Tokenizer",
    "beam_encode",
    "fit_rq_kmeans",
    "fit_rqvae",
    "fit_tokenizer",
    "load_tokenizer",
    "quantization_losses",
    "reconstruction_loss",
]
