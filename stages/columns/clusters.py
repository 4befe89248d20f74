"""Clusters of a pool's vectors, and which of them hold vectors of a target set: DataComp's image-based filter.

Gadre et al., "DataComp: In search of the next generation of multimodal datasets", 2023 (arXiv 2304.14108): 100,000
clusters of CLIP ViT-L/14 image embeddings; a sample is kept when its cluster is that of an ImageNet training image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core import exchange, storage
from pipeline.core.errors import ConfigError, WinnowError
from pipeline.core.passes import Pass, Passes
from stages.base import Batch, LoadContext
from stages.kmeans import Centroids, KMeans, Metric, choose_clusters, read_centroids
from stages.pool_blocks import Block, num_ok_rows
from stages.shard_values import FOUND, SHARDS, FittedStage, shard_names, shard_starts, write_by_shard
from stages.targets import DATACOMP_ASSETS, Targets, list_targets
from stages.unit_vectors import packed, pieces

COUNTS = "counts"  # a pass that load() reads besides FOUND
PIECE_ROWS = 250_000  # rows whose vectors a task holds, unless a shard has more
SEED, ITERATIONS = 0, 20  # as in DataComp


@dataclass(frozen=True)
class Clusters(FittedStage):
    """The row's cluster, how near it is to the centroid, how many target vectors are in the cluster, and how many rows.

    DataComp's rule is `where: [cluster_targets > 0]`: keep x where argmax_k <x, c_k> is also the argmax of a target.
    As its code does, `metric: l2` trains by Euclidean distance and then assigns by the inner product with centroids
    that are not normalised: the similarity is that product. With `cosine` centroids and vectors have length 1, and it
    is a cosine. Targets are assigned as rows are. Equally near centroids: the first. Its captions' rule is a strategy
    to work `within`, here and for the reference where it has one.

    Rows are trained on without replacement (DataComp draws large and xlarge with). All columns are null for a row
    without a vector (or with one of zeros); cluster_targets for every row where no targets are given.

    Args:
        embedding: a column of vectors, of any length other than 0: clip_image or clip_text.
        clusters: null: the square root of the ok rows (within), at most 50,000; DataComp: 100,000.
        centroids: a file of centroids [k, d] to use as they are; nothing is trained. .npy, .npz, .safetensors, or .pt
            as DataComp publishes them, which is read without executing what is in it.
        metric: see above.
        sample: how many rows, or which fraction of them (a number with a point), the centroids are trained on; null:
            256 a cluster, as faiss does, at most 500,000. DataComp: 1.0, at scale large 0.3 and at xlarge 0.03.
        seed: of the sample and where the centroids start.
        iterations: of k-means, at most.
        against: names of `references:` whose rows are targets.
        target_features: files of target vectors [n, d], as for `centroids`.

    Cost: for n rows of d dimensions and k clusters the column read once, or twice with training, and 2 n k d operations
    (12.8M rows, 768 dimensions, 100,000 clusters: 2e15, some 6 hours of two cores, and for each iteration as much for
    each row of the sample); see stages/kmeans.py. Memory of a task: 28 d bytes a cluster (2.2 GB for those), and 6 d
    bytes a row of a shard. Kept: 20 bytes a row and 16 a cluster.
    """

    embedding: str = "clip_image"
    clusters: Annotated[int, Field(ge=1)] | None = None
    centroids: str = ""
    metric: Metric = "l2"
    sample: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = SEED
    iterations: Annotated[int, Field(ge=1)] = ITERATIONS
    against: Annotated[tuple[str, ...], Field(strict=False)] = ()
    target_features: Annotated[tuple[str, ...], Field(strict=False)] = ()

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {
        "cluster_id": "int32",
        "cluster_similarity": "float32",
        "cluster_targets": "int64",
        "cluster_rows": "int64",
    }
    found_types: ClassVar[Mapping[str, pa.DataType]] = {"cluster": pa.int32(), "similarity": pa.float32()}
    uses_references: ClassVar[bool] = True
    assets: ClassVar[Mapping[str, str]] = {
        "centroids": f"DataComp's are {{small,medium,large,xlarge}}_centroids_l14.pt at {DATACOMP_ASSETS}",
        "target_features": f"DataComp's are in1k_clip_vit_l14_{{0..4}}.pt at {DATACOMP_ASSETS}",
    }

    def __post_init__(self) -> None:
        if self.centroids:
            given = {"clusters": None, "sample": None, "seed": SEED, "iterations": ITERATIONS}
            for name, default in given.items():
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"clusters.{name} = {getattr(self, name)}, expected nothing, as centroids are given"
                    )

    def empty_columns(self) -> Mapping[str, str]:
        has_targets = self.against or self.target_features
        return {} if has_targets else {"cluster_targets": "neither against nor target_features is given"}

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.embedding,)

    def external_files(self) -> Mapping[str, str]:
        files = {"centroids": self.centroids} if self.centroids else {}
        return files | {f"target_features.{number}": path for number, path in enumerate(self.target_features)}

    def fit_against(
        self, blocks: Sequence[Block], references: Mapping[str, Sequence[Block]], passes: Passes
    ) -> Mapping[str, Any]:
        """Counts of clusters, rows and targets, and how the centroids were found; the values of rows and clusters."""
        work = passes.work()
        parts = pieces(blocks, PIECE_ROWS)
        training: dict[str, Any] = {}
        if self.centroids:
            centroids = work.run("centroids", write_given, [(self.centroids, self.metric)])
        else:
            num_clusters = self.clusters or choose_clusters(num_ok_rows(parts, work))
            how = KMeans(self.embedding, num_clusters, self.seed, self.iterations, self.metric, self.sample)
            centroids = how.centroids(parts, work)
            notes = exchange.read_notes(centroids.paths)
            training = {"seed": self.seed} | {name: notes[name] for name in ("sampled", "iterations", "empty")}
        starts = shard_starts(blocks)
        items = [(block, self.embedding, self.metric, centroids, starts) for block in parts]
        found = passes.run(FOUND, write_members, items)
        given = list_targets(references, self.target_features, PIECE_ROWS)
        targets = work.run("targets", write_targets, [(one, self, centroids) for one in given]) if given else None
        counts = passes.run(COUNTS, write_counts, [(found, targets, centroids)])
        return {"training": training, **exchange.read_notes(counts.paths), SHARDS: shard_names(blocks)}

    def load(self, context: LoadContext) -> Any:
        """The clusters' counts, and what reads the values of a shard's rows."""
        counts = Pass(storage.join(context.fit_path or "", COUNTS), num_files=1)
        return super().load(context), exchange.read(counts.paths)

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        values, counts = state
        found = values.of(batch)
        if counts is None:
            none = pa.nulls(len(batch), pa.int64())
            targets, rows = none, none
        else:
            targets, rows = (counts[name].take(found["cluster"]) for name in ("targets", "rows"))
        return dict(zip(self.adds, (found["cluster"], found["similarity"], targets, rows), strict=True))


def write_given(file: str, metric: Metric, path: str) -> None:
    """None; writes the centroids of a file that the user gave."""
    from stages.tensor_files import read_rows

    rows = read_rows(file)
    if metric == "cosine" and not rows.any(axis=1).all():
        raise WinnowError(f"{file}: a centroid of length 0, expected none with metric: cosine")
    exchange.write(path, {"centroid": packed(rows)})


def write_members(block: Block, column: str, metric: Metric, centroids: Pass, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, cluster, similarity) of the block's rows, by shard."""
    vectors, cluster, similarity = Centroids(read_centroids(centroids), metric).assigned(block, column)
    write_by_shard(path, vectors.row, {"cluster": cluster, "similarity": similarity}, starts)


def write_targets(targets: Targets, stage: Clusters, centroids: Pass, path: str) -> None:
    """None; writes (cluster, count) of target vectors."""
    centres, vectors = read_centroids(centroids), targets.read(stage.embedding)
    cluster = np.empty(0, np.int32)
    if len(centres) and len(vectors):
        if vectors.shape[1] != centres.shape[1]:
            given = f"{targets.source}: vectors of {vectors.shape[1]} values"
            raise WinnowError(f"{given}, expected {centres.shape[1]} as centroids have")
        cluster, _ = Centroids(centres, stage.metric).nearest(vectors)
    number, count = np.unique(cluster, return_counts=True)
    exchange.write(path, {"cluster": number, "count": count}, notes={"targets": len(cluster)})


def write_counts(members: Pass, targets: Pass | None, centroids: Pass, path: str) -> None:
    """None; writes (rows, targets) of every cluster, the second null where there are no targets to count."""
    num_clusters = len(read_centroids(centroids))
    rows, hits = np.zeros(num_clusters, np.int64), np.zeros(num_clusters, np.int64)
    for table in exchange.read_each(members.paths):
        rows += np.bincount(table["cluster"].to_numpy(), minlength=num_clusters)
    notes = {
        "clusters": num_clusters,
        "clusters_with_rows": int((rows > 0).sum()),
        "rows_with_vectors": int(rows.sum()),
    }
    if targets is not None:
        for table in exchange.read_each(targets.paths):
            hits[table["cluster"].to_numpy()] += table["count"].to_numpy()
        if num_clusters and not hits.any():
            raise WinnowError("clusters: no target has a vector, expected some")
        notes |= {
            "targets": int(hits.sum()),
            "clusters_with_targets": int((hits > 0).sum()),
            "rows_with_targets": int(rows[hits > 0].sum()),
        }
    counted = pa.array(hits) if targets is not None else pa.nulls(num_clusters, pa.int64())
    exchange.write(path, {"rows": rows, "targets": counted}, notes=notes)
