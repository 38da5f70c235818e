"""A DLRM whose item table is replaced by SIDE: the same model, with and without the table.

    python examples/dlrm_plugin.py
    torchrun --nproc-per-node 2 examples/dlrm_plugin.py

Users click items; what they like follows the items' content. Half of the items never occur in training, so a learned
table says nothing of them, while SIDE expands their SIDs as any other's. ``replace_tables`` is the whole change to the
model; all that is learned of items then is a linear map of their digits.
"""

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec import DPCA, Codec, DPCAConfig, replace_tables
from sidrec_torchrec.training.group import Processes, process_group

ITEMS, DIM, WIDTH, HISTORY, BATCH, STEPS = 20_000, 32, 32, 20, 256, 200


def make_items() -> tuple[Tensor, Tensor, Codec]:
    """Content vectors [ITEMS, DIM] of low rank plus noise, their packed SIDs [ITEMS] and the codec."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(ITEMS, 8, generator=generator)
    vectors = latent @ torch.randn(8, DIM, generator=generator) + 0.3 * torch.randn(ITEMS, DIM, generator=generator)
    dpca = DPCA(DPCAConfig(dim=DIM))
    dpca.fit(vectors[: ITEMS // 2])
    codec = Codec.of(dpca, fingerprint="dlrm-plugin")
    return vectors / vectors.norm(dim=1, keepdim=True), codec.spec.pack(dpca.encode(vectors))[:, 0], codec


def make_batch(vectors: Tensor, seed: int, new_items: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Dense features [B, 4], item rows [B, HISTORY], labels [B]: does the user's average item point one way?"""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(ITEMS // 2, (BATCH, HISTORY), generator=generator) + new_items * (ITEMS // 2)
    logit = 30 * vectors[rows].mean(1)[:, 0]
    return torch.randn(BATCH, 4, generator=generator), rows, (torch.rand(BATCH, generator=generator) < logit.sigmoid())


def make_model(device: torch.device) -> DLRM:
    table = EmbeddingBagConfig(
        name="item", embedding_dim=WIDTH, num_embeddings=ITEMS, feature_names=["clicked"], init_fn=nn.init.zeros_
    )
    tables = EmbeddingBagCollection(tables=[table], device=device)
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": 0.1})
    torch.manual_seed(0)
    return DLRM(
        embedding_bag_collection=tables,
        dense_in_features=4,
        dense_arch_layer_sizes=[32, WIDTH],
        over_arch_layer_sizes=[64, 1],
    )


def train(name: str, model: DLRM, values: Tensor, vectors: Tensor, processes: Processes) -> None:
    """Trains on the first half of the items, tests on both; ``values`` is what the KJT carries per item."""
    parallel = DistributedModelParallel(model, device=processes.device)
    dense = dict(in_backward_optimizer_filter(parallel.named_parameters())).values()
    optimizer = torch.optim.Adagrad(dense, lr=0.05)

    def loss_of(seed: int, new_items: bool) -> Tensor:
        dense, rows, label = make_batch(vectors, seed * processes.world_size + processes.rank, new_items)
        lengths = torch.full((BATCH,), HISTORY)
        features = KeyedJaggedTensor(keys=["clicked"], values=values[rows].flatten(), lengths=lengths)
        logit = parallel(dense.to(processes.device), features.to(processes.device)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logit, label.float().to(processes.device))

    for step in range(STEPS):
        loss = loss_of(step, new_items=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        known, new = (torch.stack([loss_of(10_000 + s, is_new) for s in range(20)]).mean() for is_new in (False, True))
    learned_bytes = sum(p.numel() * p.element_size() for p in model.sparse_arch.parameters())
    if processes.is_main:
        print(f"{name:<6} learned {learned_bytes:>9,} bytes   loss on known items {known:.4f}, on new items {new:.4f}")


def main() -> None:
    vectors, sids, codec = make_items()
    with process_group() as processes:
        train("table", make_model(processes.device), torch.arange(ITEMS), vectors, processes)
        with_side = replace_tables(make_model(processes.device), {"item": codec})
        train("SIDE", with_side, sids, vectors, processes)


if __name__ == "__main__":
    main()
