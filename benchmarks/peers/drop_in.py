"""Other systems' own loops, as they are and with the change of ``docs/drop_in.md`` applied.

A loop is prepared with ``changed`` False or True and gives its answer as a tensor; both must give
the same. The change is not written down twice: it is read from the page.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import embedding_like, fitted_codebooks
from benchmarks.peers import checkouts
from plum.decode import SidBeamSearch
from plum.trie import SidTrie

PAGE = Path(__file__).resolve().parents[2] / "docs" / "drop_in.md"
GRID, MINIONEREC = "snap-research/GRID", "AkaliKong/MiniOneRec"
RECOMMENDER, STATIC = "EdoardoBotta/RQ-VAE-Recommender", "youtube/static-constraint-decoding"
REPOSITORIES = (GRID, MINIONEREC, RECOMMENDER, STATIC)
# A model's words begin with the end token; the tokens of SIDs come behind them.
_END, _PROMPT = 0, 32


class Loop(NamedTuple):
    """A loop to time.

    Attributes:
        run: Runs it once from the same start; gives its answer, int64 ``[..., L]``.
        rows: Items encoded, or requests answered, by a run.
        operations: Operations that a run needs.
        nbytes: Bytes that a run must move at the least.
    """

    run: Callable[[], Tensor]
    rows: int
    operations: float
    nbytes: float


class Sizes(NamedTuple):
    """Rows, their width, codes a level; beams, SIDs; the layers and words of the model."""

    rows: int = 2_048
    width: int = 64
    codes: int = 256
    beams: int = 16
    sids: int = 20_000
    layers: int = 2
    words: int = 1_000


FULL = Sizes(32_768, 96, 256, 64, 100_000, 6, 20_000)


def section(title: str) -> str:
    """Returns the Python of a section of the page, which is what a user would copy."""
    text = PAGE.read_text(encoding="utf-8")
    body = re.split(r"^## ", text, flags=re.MULTILINE)
    (found,) = [part for part in body if part.startswith(f"{title}\n")]
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", found, re.DOTALL | re.MULTILINE))


@functools.cache
def change(title: str, repository: str | None = None) -> dict[str, Any]:
    """Runs the Python of a section, within a checkout where it needs one; returns its names."""
    names: dict[str, Any] = {"__name__": "drop_in"}
    code = compile(section(title), f"{PAGE.name}, {title}", "exec")
    if repository is None:
        exec(code, names)
    else:
        with checkouts.importing(repository, ""):
            exec(code, names)
    return names


def vector_quantize_pytorch_training(changed: bool, sizes: Sizes) -> Loop:
    """An autoencoder around ResidualVQ: eight steps of Adam from one start."""
    from vector_quantize_pytorch import ResidualVQ

    from plum.quantize import ResidualVQ as PlumResidualVQ

    torch.manual_seed(0)
    options = {"dim": sizes.width, "num_quantizers": 3, "codebook_size": sizes.codes}
    start = ResidualVQ(**options)
    ends = nn.Linear(4 * sizes.width, sizes.width), nn.Linear(sizes.width, 4 * sizes.width)
    x, books = _encoded_catalog(ends[0], sizes)
    for level, book in zip(start.layers, books, strict=True):
        level._codebook.embed.data.copy_(book[None])
        level._codebook.embed_avg.data.copy_(book[None])
        level._codebook.cluster_size.data.fill_(1)
    model = nn.Sequential(ends[0], (PlumResidualVQ if changed else ResidualVQ)(**options), ends[1])
    model[1].load_state_dict(start.state_dict())
    first = {name: value.clone() for name, value in model.state_dict().items()}

    def run() -> Tensor:
        model.load_state_dict(first)
        model.train()
        optimizer, found = torch.optim.Adam(model.parameters(), lr=1e-4), []
        for batch in x.chunk(8):
            quantized, codes, losses = model[1](model[0](batch)[None])
            loss = nn.functional.mse_loss(model[2](quantized)[0], batch) + losses.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(codes[0].detach())
        return torch.cat(found)

    layers = 6 * 2 * x.numel() * sizes.width
    search = 2 * sizes.rows * sizes.width * 3 * sizes.codes
    return Loop(run, sizes.rows, layers + search, 2.0 * x.nbytes)


def grid_encode(changed: bool, sizes: Sizes) -> Loop:
    """GRID: three layers of MiniBatchKMeans over a catalog, in batches of 2,048."""
    kmeans = "src.models.modules.clustering.mini_batch_kmeans"
    with checkouts.importing(GRID, "") as load:
        distance = load("src.components.distance_functions").SquaredEuclideanDistance()
        initializer = load("src.components.clustering_initializers").RandomInitializer
        kind = load(kmeans).MiniBatchKMeans
    if changed:
        kind = change("GRID", GRID)["PlumKMeans"]
    x, books = _catalog(sizes, 3)
    layers = []
    for book in books:
        layer = kind(len(book), sizes.width, distance, initializer(len(book)))
        layer.centroids.data.copy_(book)
        layers.append(layer.eval())

    def run() -> Tensor:
        found = []
        for residual in x.split(2_048):
            codes = []
            for layer in layers:
                ids, embeddings = layer.predict_step(residual)
                residual = residual - embeddings
                codes.append(ids)
            found.append(torch.stack(codes, dim=1))
        return torch.cat(found)

    return _encoding(run, x, books)


def rqvae_recommender_encode(changed: bool, sizes: Sizes) -> Loop:
    """RQ-VAE-Recommender: the SIDs of a corpus, in the batches of 512 of its tokenizer."""
    kind = checkouts.load(RECOMMENDER, "", "modules.rqvae").RqVae
    if changed:
        kind = change("RQ-VAE-Recommender", RECOMMENDER)["PlumRqVae"]
    torch.manual_seed(0)
    model = kind(
        input_dim=4 * sizes.width,
        embed_dim=sizes.width,
        hidden_dims=[2 * sizes.width],
        codebook_size=sizes.codes,
        codebook_kmeans_init=False,
        n_cat_features=0,
    ).eval()
    x, books = _encoded_catalog(model.encode, sizes)
    for layer, book in zip(model.layers, books, strict=True):
        layer.embedding.weight.data.copy_(book)

    @torch.no_grad()
    def run() -> Tensor:
        return torch.cat([model.get_semantic_ids(part).sem_ids for part in x.split(512)])

    return _encoding(run, x, books, encoder=model.encoder)


def minionerec_indices(changed: bool, sizes: Sizes) -> Loop:
    """MiniOneRec: the indices of a catalog, in batches of 64; with the change, of 8,192."""
    torch.manual_seed(0)
    model = (
        checkouts.load(MINIONEREC, "rq", "models.rqvae")
        .RQVAE(
            in_dim=4 * sizes.width,
            num_emb_list=[sizes.codes] * 3,
            e_dim=sizes.width,
            layers=[2 * sizes.width],
            sk_epsilons=[0.0] * 3,
        )
        .eval()
    )
    x, books = _encoded_catalog(model.encoder, sizes)
    for layer, book in zip(model.rq.vq_layers, books, strict=True):
        layer.embedding.weight.data.copy_(book)
    get_indices = change("MiniOneRec", MINIONEREC)["get_indices"] if changed else None

    def run() -> Tensor:
        if get_indices is not None:
            return torch.cat([get_indices(model, part) for part in x.split(8_192)])
        return torch.cat([model.get_indices(part, use_sk=False) for part in x.split(64)])

    return _encoding(run, x, books, encoder=model.encoder)


def minionerec_generate(changed: bool, sizes: Sizes) -> Loop:
    """MiniOneRec: beams of two prompts, by its processor in generate, the end token included."""
    from benchmarks.peers import minionerec_trie

    tokens, model, prompts = _generation(sizes)
    prompts[:, -3:] = torch.tensor(minionerec_trie._PROMPT)
    mask = torch.ones_like(prompts)
    depth, width = tokens.shape[1], sizes.beams
    if changed:
        names = change("MiniOneRec", MINIONEREC)
        trie = names["make_trie"](tokens.numpy(), None, _END)
        search = names["SidBeamSearch"](model, trie)
        offsets = torch.tensor(trie.token_offsets)

        def run() -> Tensor:
            return (search.search(prompts, mask, width).sids + offsets)[..., :depth]

        return _search(run, model, prompts, depth + 1, width)
    kind = checkouts.load(MINIONEREC, "", "LogitProcessor").ConstrainedLogitsProcessor
    allowed = minionerec_trie.build(tokens.numpy(), _END)

    def run_theirs() -> Tensor:
        # It counts its calls, so each search needs a new one.
        process = kind(lambda batch, prefix: allowed.get("-".join(map(str, prefix)), []), width,
                       base_model="qwen")  # fmt: skip
        return _generate(model, prompts, depth + 1, width, logits_processor=[process])[..., :depth]

    return _search(run_theirs, model, prompts, depth + 1, width)


def lc_rec_generate(changed: bool, sizes: Sizes) -> Loop:
    """LC-Rec-style code: an index.json, its tokens added in the order of text; two prompts."""
    tokens, model, prompts = _generation(sizes)
    codes = tokens - tokens.amin(dim=0)
    index = {
        str(item): [f"<{'abcd'[level]}_{code}>" for level, code in enumerate(sid)]
        for item, sid in enumerate(codes.tolist())
    }
    added = sorted({token for sid in index.values() for token in sid})
    ids = {token: sizes.words + place for place, token in enumerate(added)}

    class Tokenizer:
        def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
            return [ids[token] for token in tokens]

    depth, width = tokens.shape[1], sizes.beams
    if changed:
        names = change("LC-Rec-style code and its index.json")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "items.index.json"
            path.write_text(json.dumps(index))
            trie = names["trie_of_index"](path, Tokenizer())
        search = names["SidBeamSearch"](model, trie)
        offsets = torch.tensor(trie.token_offsets)
        mask = torch.ones_like(prompts)

        def run() -> Tensor:
            return search.search(prompts, mask, width).sids + offsets

        return _search(run, model, prompts, depth, width)
    spelled = torch.tensor([Tokenizer().convert_tokens_to_ids(sid) for sid in index.values()])
    return _prefix_function(model, spelled, prompts, width)


def transformers_generate(changed: bool, sizes: Sizes) -> Loop:
    """transformers: generate with a prefix function over nested dicts; beams of two prompts."""
    tokens, model, prompts = _generation(sizes)
    if not changed:
        return _prefix_function(model, tokens, prompts, sizes.beams)
    offsets = tokens.amin(dim=0)
    trie = SidTrie.from_codes(tokens - offsets, token_offsets=offsets)
    search, mask = SidBeamSearch(model, trie), torch.ones_like(prompts)

    def run() -> Tensor:
        return search.search(prompts, mask, sizes.beams).sids + offsets

    return _search(run, model, prompts, tokens.shape[1], sizes.beams)


def static_decode(changed: bool, sizes: Sizes) -> Loop:
    """STATIC: its harness around a model of a token embedding and a head, eight requests.

    It considers as many children of a beam as there are beams, which is enough to be exact.
    """
    from benchmarks.peers import static_decoding

    table = _sids(sizes)
    codes = sizes.codes
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(codes, 32), nn.Linear(32, codes)).eval()
    batch, beams = 8, sizes.beams
    operations = batch * (1 + beams * (table.shape[1] - 1)) * 2 * 32.0 * codes
    nbytes = batch * (1 + beams * (table.shape[1] - 1)) * 4.0 * codes
    if changed:
        decode = change("STATIC")["sparse_transition"]
        trie = SidTrie.from_codes(table, codebook_sizes=[codes] * table.shape[1])
        with torch.inference_mode():
            decode(model, trie, batch, beams, 0)

        @torch.inference_mode()
        def run() -> Tensor:
            return decode(model, trie, batch, beams, 0)

        return Loop(run, batch, operations, nbytes)
    index = static_decoding.build(table, codes)

    def run_theirs() -> Tensor:
        return static_decoding._search.sparse_transition_torch(
            model, batch, beams, beams, 0, table.shape[1], codes, index.branches, index.packed,
            index.starts, index.root, index.dense_mask, index.dense_states, torch.device("cpu"),
        )  # fmt: skip

    return Loop(run_theirs, batch, operations, nbytes)


def _catalog(sizes: Sizes, levels: int) -> tuple[Tensor, list[Tensor]]:
    """Rows ``[N, D]`` and codebooks that fit them."""
    x = embedding_like(sizes.rows, sizes.width, seed=2)
    return x, fitted_codebooks(sizes.width, [sizes.codes] * levels)


def _encoded_catalog(
    encode: Callable[[Tensor], Tensor], sizes: Sizes
) -> tuple[Tensor, list[Tensor]]:
    """Rows ``[N, 4 D]``, and codebooks of three levels made of encoded rows and what is left."""
    x = embedding_like(sizes.rows, 4 * sizes.width, seed=2)
    books: list[Tensor] = []
    with torch.no_grad():
        residual = encode(embedding_like(4 * sizes.codes, 4 * sizes.width, seed=1))
        for _ in range(3):
            books.append(residual[: sizes.codes].clone())
            nearest = torch.cdist(residual, books[-1]).argmin(dim=1)
            residual = (residual - books[-1][nearest]).roll(sizes.codes, dims=0)
    return x, books


def _encoding(
    run: Callable[[], Tensor], x: Tensor, books: list[Tensor], encoder: nn.Module | None = None
) -> Loop:
    weights = 0 if encoder is None else sum(each.numel() for each in encoder.parameters())
    search = sum(book.numel() for book in books)
    return Loop(run, len(x), 2.0 * len(x) * (weights + search), float(x.nbytes))


def _sids(sizes: Sizes) -> np.ndarray:
    """Distinct SIDs int64 ``[N, 3]``, low codes more frequent."""
    random = np.random.default_rng(0)
    return np.unique((sizes.codes * random.random((sizes.sids, 3)) ** 2).astype(np.int64), axis=0)


def _generation(sizes: Sizes) -> tuple[Tensor, Any, Tensor]:
    """SIDs as tokens ``[N, 3]``, a model of a GPT-2 shape, and two prompts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = torch.from_numpy(_sids(sizes)) + sizes.words + sizes.codes * torch.arange(3)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes.words + 3 * sizes.codes,
        n_layer=sizes.layers,
        n_embd=2 * sizes.width,
        n_head=2,
        n_positions=64,
        initializer_range=0.05,
        bos_token_id=_END,
        eos_token_id=_END,
    )
    model = GPT2LMHeadModel(config).eval()
    prompts = torch.randint(
        1, sizes.words, (2, _PROMPT), generator=torch.Generator().manual_seed(1)
    )
    return tokens, model, prompts


def _generate(model: Any, prompts: Tensor, steps: int, width: int, **options: Any) -> Tensor:
    """Beams of generate as it is called for SIDs, tokens ``[B, W, steps]``."""
    found = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=steps,
        do_sample=False,
        length_penalty=0.0,
        pad_token_id=_END,
        **options,
    )
    return found[:, prompts.shape[1] :].view(len(prompts), width, steps)


def _prefix_function(model: Any, tokens: Tensor, prompts: Tensor, width: int) -> Loop:
    root: dict[int, Any] = {}
    for sid in tokens.tolist():
        node = root
        for token in sid:
            node = node.setdefault(token, {})
    depth = tokens.shape[1]

    def allowed(request: int, sequence: Tensor) -> list[int]:
        node = root
        for token in sequence[prompts.shape[1] :].tolist():
            node = node[token]
        return list(node)

    def run() -> Tensor:
        return _generate(model, prompts, depth, width, eos_token_id=None,
                         prefix_allowed_tokens_fn=allowed)  # fmt: skip

    return _search(run, model, prompts, depth, width)


def _search(run: Callable[[], Tensor], model: Any, prompts: Tensor, steps: int, width: int) -> Loop:
    weights = sum(each.numel() for each in model.parameters())
    tokens = prompts.numel() + len(prompts) * width * (steps - 1)
    return Loop(run, len(prompts), 2.0 * weights * tokens, 4.0 * weights * steps)


# What a loop is called in tables.
LOOPS: dict[str, Callable[[bool, Sizes], Loop]] = {
    "vector-quantize-pytorch, training": vector_quantize_pytorch_training,
    "GRID, encoding": grid_encode,
    "RQ-VAE-Recommender, encoding": rqvae_recommender_encode,
    "MiniOneRec, encoding": minionerec_indices,
    "MiniOneRec, generation": minionerec_generate,
    "LC-Rec-style, generation": lc_rec_generate,
    "STATIC, decoding": static_decode,
    "transformers, generation": transformers_generate,
}
