"""faiss (package faiss-cpu): its residual quantizer, a flat index a level, and k-means."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import torch
from torch import Tensor


def residual_quantizer(x: Tensor, codebooks: list[Tensor], lut: int = 0) -> Callable[[], Tensor]:
    faiss.omp_set_num_threads(torch.get_num_threads())
    bits = faiss.UInt64Vector()
    for book in codebooks:
        assert len(book).bit_count() == 1, "faiss takes powers of two"
        bits.push_back(len(book).bit_length() - 1)
    rq = faiss.ResidualQuantizer(x.shape[1], bits)
    rq.max_beam_size = 1
    rq.use_beam_LUT = lut
    faiss.copy_array_to_vector(torch.cat(codebooks).numpy().ravel(), rq.codebooks)
    rq.is_trained = True
    rq.compute_codebook_tables()
    rows = x.numpy()
    sizes = faiss.vector_to_array(bits).astype("int32")

    def run() -> Tensor:
        return torch.from_numpy(faiss.unpack_bitstrings(rq.compute_codes(rows), sizes))

    return run


def residual_quantizer_lut(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    return residual_quantizer(x, codebooks, lut=1)


def index_flat(x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    faiss.omp_set_num_threads(torch.get_num_threads())
    indexes = []
    for book in codebooks:
        indexes.append(faiss.IndexFlatL2(book.shape[1]))
        indexes[-1].add(book.numpy())

    def run() -> Tensor:
        codes = torch.empty(len(x), len(codebooks), dtype=torch.int32)
        r = x
        for level, book in enumerate(codebooks):
            code = torch.from_numpy(indexes[level].search(r.numpy(), 1)[1][:, 0])
            codes[:, level] = code
            r = r - book[code]
        return codes

    return run


def kmeans(x: Tensor, start: Tensor, iterations: int) -> Callable[[], Tensor]:
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, init = x.numpy(), start.numpy()

    def run() -> Tensor:
        model = faiss.Kmeans(
            x.shape[1], len(start), niter=iterations, max_points_per_centroid=len(x)
        )
        model.train(rows, init_centroids=init)
        return torch.from_numpy(model.centroids)

    return run
