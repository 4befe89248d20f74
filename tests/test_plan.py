"""What is planned, refused and identified, without starting anything."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import pytest
import yaml

from pipeline import account, execute, remote, runs, states
from pipeline import plan as planning
from pipeline.core import artifact, config, storage
from pipeline.core.errors import ConfigError, StepError
from tests.download_fixture import write_table
from tests.engine_fixture import EngineHere, run_here
from tests.task_fixture import write_files
from tests.test_metadata_run import metadata

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests" / "tiny.yaml")


def plan_of(tmp_path, *overrides, path=TINY):
    return planning.build(config.load(path, [f"root={tmp_path}/root", *overrides]), path)


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages=[{name: language, as: pool}]", r"stages\.0\.as = pool, expected a name"),
        ("stages=[{name: language, as: no_filter/selection}]", r"stages\.0\.as = no_filter/selection"),
        ("stages=[{name: [a]}]", r"stages\.0\.name = \['a'\], expected the name of a stage"),
        ("stages=[{name: clip, model: scorer}, {name: clip, model: scorer}]", r"a second stage is called clip"),
        ("strategies.trusted={}", r"strategies\.trusted: a reference has this name"),
        ("strategies.basic={reference: [a]}", r"strategies\.basic\.reference = \['a'\]"),
        ("models.spare={recipe: tiny, on: trusted}", r"models\.spare has no effect"),
        ("models.scorer.pretrained=openai", r"models\.scorer\.pretrained has no effect"),
        ("models.scorer={architecture: ViT-B-33, pretrained: openai}", r"ViT-B-33, expected an architecture .* Did you mean ViT-B-32"),
        ("models.scorer={architecture: ViT-B-32, pretrained: opnai}", r"pretrained = opnai, expected a weights file .* Did you mean openai"),
        ("models.scorer={architecture: ViT-B-32, pretrained: /tmp}", r"models\.scorer\.pretrained = /tmp, expected a file that can be read"),
        ("recipes.tiny.model.vision_cfg=5", r"vision_cfg = 5, expected a mapping"),
        ("stages=[{name: clip, model: scorer}, {name: clusters, as: c}]\nstrategies={a: {where: [c_cluster_targets > 0]}}\ncompare=[a]", r"strategies\.a uses c_cluster_targets, which has no values: stages\.c: neither against"),
        ("stages=[{name: hashes, as: train}]", r"stages\.0\.as = train, expected a name"),
        ("stages=[hashes, {name: contamination, within: basic}]", r"stages\.contamination\.within: it is about the whole pool"),
        ("stages=[{name: negclip, text: clip_image}]", r"stages\.0: negclip\.text = clip_image, expected another column"),
        ("cluster.pool={max_concurrent: 2}", r"cluster\.pool\.max_concurrent has no effect"),
        ("cluster.select={workers: 2}", r"cluster\.select\.workers has no effect"),
        ("cluster.eval={min_workers: 2}", r"cluster\.eval\.min_workers has no effect"),
        ("cluster.train={workers: 2, min_workers: 2}", r"cluster\.train\.min_workers = 2, expected fewer than its"),
        ("cluster.train={workers: 2, gpus: 0.5}", r"cluster\.train\.gpus = 0\.5, expected 0 or 1 for each"),
        ("cluster.klip={gpus: 1}", r"cluster\.klip is no step\. Did you mean clip"),
        ("eval.leave_out=hashes", r"eval\.leave_out = hashes, expected a stage that is `against: tasks`"),
        ("eval.tasks=[colours, colours]", r"expected each task once"),
        ("strategies.basic={uids: /nothing.npy}", r"/nothing\.npy"),
        ("stages.2={name: language, model: /tmp}", r"/tmp"),
        ("pool.source={path: 's3://no-such-bucket-of-ours/x'}", r"pool\.source"),
        ("train.seeds=[99999999999]", r"train\.seeds"),
        ("cluster.train_set={batch_size: 2}", r"cluster\.train_set\.batch_size has no effect"),
        ("recipes.tiny.num_checkpoints=3\ntrain.budgets=[300, 60]", r"train\.budgets: 60: num_checkpoints = 3, expected at most its 2 steps"),
        ("recipes.tiny.image_size_px=20", r"recipes\.tiny\.model: images of 20 px, expected a multiple of its patches of 8 px"),
        ("models.scorer={architecture: ViT-B-32, pretrained: openai}\ntrain.recipe=debug\nrecipes.debug={start_from: scorer, model: ViT-B-32, loss: siglip, global_batch_size: 8, samples_seen: 16, lr: 1e-3}", r"recipe debug: start_from = scorer, whose loss is clip, expected siglip"),
        ("recipes.tiny.start_from=scorr", r"recipe tiny: start_from = scorr, expected one of the models\. Did you mean scorer"),
        ("recipes.tiny.start_from=scorer", r"models\.scorer -> models\.scorer: a cycle"),
        ("train.recipe=debug\nrecipes.debug={start_from: scorer, model: ViT-B-32, global_batch_size: 8, samples_seen: 16, lr: 1e-3}", r"recipe debug: start_from = scorer, whose model is another one, expected ViT-B-32"),
        ("train.recipe=warm\nrecipes.warm=WARM", r"recipe warm: start_from = scorer, whose loss is clip, expected siglip"),
        ("root=s3://bucket\ntrain.log_to=[tensorboard]", r"train\.log_to = tensorboard, expected a local root"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(tmp_path, monkeypatch, override, message):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody outside is asked
    tiny = config.parse_yaml(pathlib.Path(TINY).read_text(), TINY)["recipes"]["tiny"]
    override = override.replace("WARM", json.dumps(tiny | {"start_from": "scorer", "loss": "siglip"}))
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(tmp_path, *override.splitlines())
    assert "\n" not in str(caught.value)


ONE = ("stages=[]", "strategies={no_filter: {}}", "compare=[no_filter]")  # nothing to score


def test_a_part_with_a_seed_of_its_own_is_the_same_in_all_trainings(tmp_path):
    def seeds(*overrides):
        plan = plan_of(tmp_path, *ONE, "models={}", "train.seeds=[3, 4]", *overrides)
        return [plan.steps[f"no_filter/seed{seed}/train"].values["seeds"] for seed in (3, 4)]

    assert seeds() == [{"initialisation": 3, "order": 3}, {"initialisation": 4, "order": 4}]
    assert seeds("train.order_seed=9") == [{"initialisation": 3, "order": 9}, {"initialisation": 4, "order": 9}]
    assert seeds("train.initialisation_seed=0") == [
        {"initialisation": 0, "order": 3},
        {"initialisation": 0, "order": 4},
    ]
    scorer = plan_of(tmp_path, "train.order_seed=9").steps["model/scorer"]
    assert scorer.values["seeds"] == {"initialisation": 1, "order": 1}  # it is no training of the comparison


def test_each_budget_is_a_training_with_a_schedule_of_its_own(tmp_path):
    one = plan_of(tmp_path, "train.budgets=[96]")
    assert "no_filter/seed0/train" in one.steps
    assert one.recipe.samples_seen == 96
    several = plan_of(tmp_path, "train.budgets=[300, 96]")
    assert list(several.recipes) == [96, 300]
    assert several.recipe.samples_seen == 300
    small, large = (several.steps[f"oracle/samples{num}/seed0/train"] for num in (96, 300))
    assert (small.work.recipe.num_steps, large.work.recipe.num_steps) == (3, 10)
    assert small.inputs == large.inputs
    assert small.values == one.steps["oracle/seed0/train"].values
    assert large.values == plan_of(tmp_path).steps["oracle/seed0/train"].values
    assert several.steps["oracle/samples96/seed0/eval/colours"].inputs["checkpoint"] == small.name
    assert planning.targets(several, "samples96/seed0/train") == [
        f"{name}/samples96/seed0/train" for name in several.config.compare
    ]
    warned = plan_of(tmp_path, "train.budgets=[300, 32]").warnings
    assert [line.partition(":")[0] for line in warned] == ["recipe tiny at samples_seen = 32"]


def test_a_training_starts_from_a_model_of_the_run_or_a_published_one(tmp_path):
    warm = "recipes.warm=" + yaml.safe_dump(yaml.safe_load(pathlib.Path(TINY).read_text())["recipes"]["tiny"])
    plan = plan_of(tmp_path, *ONE, warm, "recipes.warm.start_from=scorer", "train.recipe=warm")
    step = plan.steps["no_filter/seed0/train"]
    assert step.inputs["start"] == "model/scorer"
    assert list(plan.steps).index("model/scorer") < list(plan.steps).index(step.name)
    assert step.values["recipe"]["start_from"] == "input"
    assert step.work.start is None
    same = [*ONE, warm, "recipes.warm.start_from=scorer", "train.recipe=warm", "train.order_seed=1"]
    assert plan_of(tmp_path, *same).recipe.start_from == "scorer"
    with pytest.raises(ConfigError, match=r"train\.seeds = \[0, 1\], expected one seed: from one model"):
        plan_of(tmp_path, *same, "train.seeds=[0, 1]")
    with pytest.raises(ConfigError, match=r"train\.initialisation_seed has no effect where the recipe starts from"):
        plan_of(tmp_path, *same, "train.initialisation_seed=1")
    renamed = plan_of(
        tmp_path, *ONE, warm, "models={other: {recipe: tiny, on: trusted, seed: 1}}", "recipes.warm.start_from=other",
        "train.recipe=warm",
    )  # fmt: skip
    assert renamed.steps["no_filter/seed0/train"].values == step.values

    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    named = f"{{architecture: ViT-B-32, pretrained: {weights}}}"
    warm = "recipes.warm={model: ViT-B-32, global_batch_size: 8, samples_seen: 16, lr: 1e-3, start_from: b32}"
    plan = plan_of(tmp_path, *ONE, warm, f"models={{b32: {named}}}", "train.recipe=warm")
    step = plan.steps["no_filter/seed0/train"]
    assert step.work.start == {"architecture": "ViT-B-32", "pretrained": str(weights)}
    assert step.values["recipe"]["start_from"]["weights"] == storage.sha256_file(str(weights))
    assert str(tmp_path) not in repr(step.values)
    assert set(step.inputs) == {"train_set"}


def test_the_images_of_a_task_are_decoded_once_for_all_trainings(tmp_path):
    plan = plan_of(tmp_path, "train.seeds=[0, 1]", "train.budgets=[96, 300]")
    assert [name for name in plan.steps if plan.steps[name].kind == "task_images"] == ["images/colours", "images/retrieval"]  # fmt: skip
    results = [step for step in plan.steps.values() if step.kind == "results"]
    assert len(results) == 4 * 2 * 2 * 2
    assert all(step.inputs["images"] == f"images/{step.work}" for step in results)
    images = plan.steps["images/colours"]
    assert set(images.values) == {"task", "model", "image_size_px"}  # nothing of budgets, seeds or learning rates
    smaller = plan_of(tmp_path, "recipes.tiny.image_size_px=8").steps["images/colours"]
    assert smaller.values != images.values


def test_what_is_held_out_is_an_input_and_must_have_images(tmp_path):
    plan = plan_of(tmp_path, "train.held_out=trusted")
    assert plan.steps["no_filter/seed0/train"].inputs["held_out"] == "reference/trusted"
    assert "held_out" not in plan.steps["model/scorer"].inputs
    assert plan.warnings == ["train.held_out = trusted: trusted_only trains on it, so nothing is held out"]
    table = write_table(tmp_path / "t.parquet", ["http://example.org/1.jpg"])
    rows = f"references={{rows: {{source: {{path: {table}, layout: urls}}, download: false}}}}"
    with pytest.raises(ConfigError, match=r"train\.held_out: references\.rows\.download = false, expected pairs with"):
        plan_of(tmp_path, *ONE, "models={}", rows, "train.held_out=rows")


def test_a_tracker_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks what can't be imported
    with pytest.raises(ConfigError, match=r"train\.log_to = wandb, expected the package wandb to be installed"):
        plan_of(tmp_path, "train.log_to=[wandb]")


@pytest.mark.parametrize("scale", ["small", "medium", "large", "xlarge"])
def test_the_datacomp_configs_plan_with_metadata_in_place(tmp_path, scale):
    """Sources and tasks are tiny stand-ins, recipes and strategies the real ones; assets that are missing are named."""
    path = str(ROOT / "configs" / f"datacomp_{scale}.yaml")
    metadata(tmp_path / "metadata", (30,))
    source = f"pool.source.path={tmp_path}/metadata/*.parquet"
    assets = [f"stages.5.centroids={tmp_path}/c.pt", f"stages.5.target_features=[{tmp_path}/t.pt]"]
    assets += [f"stages.4.wordnet={tmp_path}/wordnet", f"stages.4.ids={tmp_path}/ids.txt"]
    plan = plan_of(tmp_path, source, *assets, "stages.2=language", "eval.root=demo", "eval.tasks=[objects]", path=path)
    assert plan.recipe.samples_seen == {"small": 12.8e6, "medium": 128e6, "large": 1.28e9, "xlarge": 12.8e9}[scale]
    assert plan.steps["clusters"].inputs["within"] == "clusters/within"
    missing = "\n".join(plan.warnings)
    assert (
        f"stages.clusters does not run, and what needs it is N/A: centroids = {tmp_path}/c.pt is not there: " in missing
    )
    assert "stages.imagenet_words does not run" in missing
    found = states.resolve(plan)
    assert found["clusters"].state == "unavailable"
    assert found["image_based/selection"].state == "unavailable"


def test_the_filtering_network_is_charged_to_what_it_chose(tmp_path):
    path = str(ROOT / "configs" / "filtering_network.yaml")
    recipe = yaml.safe_load(pathlib.Path(TINY).read_text())["recipes"]["tiny"]
    plan = plan_of(
        tmp_path, "pool={source: {layout: demo, pairs: 60}, shard_size: 60}", "stages.1=image_stats", "models={network: {recipe: network, on: trusted}}",
        "references.trusted={source: {layout: demo, pairs: 48, clean: true}, shard_size: 48}",
        f"recipes.network={yaml.safe_dump(recipe)}", "eval.root=demo", "eval.tasks=[objects]", "cluster={}",
        "strategies.openai_15={}", "train.recipe=network", path=path,
    )  # fmt: skip
    outcome = run_here(plan, ["network_15/selection", "random_15/selection"])
    assert not outcome.failures
    cost = account.cost_of_choosing(plan, "network_15", outcome.statuses)
    assert cost["samples_seen"] == recipe["samples_seen"]
    assert cost["cpu_hours"] > outcome.statuses["model/network"].record["facts"]["cpu_hours"] > 0
    assert account.cost_of_choosing(plan, "random_15", outcome.statuses)["samples_seen"] == 0
    (phrase,) = account.uses(plan, "network_15", outcome.statuses)
    assert phrase.startswith("model network: trained on trusted (network), 300 samples, ")


def test_a_missing_asset_makes_its_strategies_na_and_no_others(tmp_path):
    stages = f"stages=[image_stats, {{name: metaclip, metadata: {tmp_path}/none.json, threshold: 5}}]"
    strategies = "strategies={balanced: {where: [metaclip_probability > 0]}, wide: {where: [aspect_ratio > 1]}}"
    overrides = [stages, strategies, "compare=[wide, balanced]", "models={}"]
    plan = plan_of(tmp_path, *overrides)
    outcome = run_here(plan, ["wide/selection", "balanced/selection"])
    assert outcome.statuses["wide/selection"].state == "done"
    assert outcome.statuses["balanced/selection"].state == "unavailable"
    assert set(outcome.failures) == {"metaclip"}
    assert outcome.failures["metaclip"].startswith(
        f"metadata = {tmp_path}/none.json is not there: metadata.json of http"
    )
    line = next(one for one in states.describe(plan, ["balanced/selection"])[0].splitlines() if "balanced" in one)
    assert line.split() == ["balanced/selection", "unavailable", "needs", "metaclip"]
    (tmp_path / "none.json").write_text('["star"]')
    assert states.resolve(plan_of(tmp_path, *overrides))["metaclip"].state == "todo"


def test_a_table_of_urls_is_chosen_from_before_it_is_downloaded(tmp_path):
    table = write_table(
        tmp_path / "t.parquet", ["http://example.org/1.jpg"], original_width=[640], original_height=[480]
    )
    source = f"pool.source={table}"
    plan = plan_of(tmp_path, source, "pool.only=basic", "strategies.oracle={}")
    assert plan.steps["pool"].inputs == {"urls": "urls", "selection": "urls/selection"}
    assert {"urls/image_stats", "urls/caption_stats", "urls/language"} < set(plan.steps)
    assert "urls/clip" not in plan.steps
    before = plan.steps["pool"].values
    for changes_nothing in ("retries=9", "per_host_concurrency=1", "contact=mailto:a@b", "retry=failed"):
        again = plan_of(tmp_path, source, "strategies.oracle={}", f"pool.download.{changes_nothing}")
        assert again.steps["pool"].values == before
    for changes_rows in ("image.size_px=256", "checksum=reject", "max_redirects=1", "engine=img2dataset"):
        again = plan_of(tmp_path, source, "strategies.oracle={}", f"pool.download.{changes_rows}")
        assert again.steps["pool"].values != before
    excluding = plan_of(tmp_path, source, "strategies.oracle={}", "exclude.domains=[example.org]")
    assert excluding.steps["pool"].values == before  # a takedown downloads nothing again
    assert excluding.steps["basic_and_clip/selection"].values != plan.steps["basic_and_clip/selection"].values


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["pool.only=basic_and_clip"], "the stage clip needs images, a model or the whole pool"),
        (
            ["pool.only=small", "strategies.small={where: [http_status == 200]}"],
            "uses http_status, expected only columns",
        ),
        (["pool.only=basics"], r"pool\.only = basics, expected a strategy\. Did you mean basic"),
        (["pool.download.retrys=3"], r"pool\.download\.retrys is an unknown key\. Did you mean retry"),
        (["pool.download.retry=[timeout]"], "pool.download.retry: timeout, expected failed or classes of failures"),
        (["pool.download.image.resize=shrink"], r"pool\.download\.image\.resize = shrink, expected one of"),
        (["exclude.uids=/nowhere.npy"], r"exclude\.uids = /nowhere\.npy, expected"),
        (["exclude.domains=[http://a.org]"], r"exclude\.domains: 'http://a.org', expected a host's name"),
        (
            ["pool.source=demo", "pool.download.retries=3"],
            "pool.download has no effect: the source is no table of URLs",
        ),
        (["pool.source=demo", "pool.only=basic"], "pool.only has no effect: the source is no table of URLs"),
    ],
)
def test_what_cannot_be_downloaded_is_refused_in_one_line(tmp_path, overrides, message):
    table = write_table(tmp_path / "t.parquet", ["http://example.org/1.jpg"])
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, f"pool.source={table}", "strategies.oracle={}", *overrides)


@pytest.mark.parametrize(
    "stages, message",
    [
        ("[caption_duplicates]", "stages.caption_duplicates needs the column minhash_signature, which no stage adds"),
        (
            "[{name: minhash, num_permutations: 32}, {name: caption_duplicates, bands: 8, rows: 6}]",
            "stages.caption_duplicates.bands = 8, rows = 6: 48, expected at most minhash's 32 permutations",
        ),
        (
            "[minhash, {name: caption_duplicates, keep: caption}]",
            "stages.caption_duplicates.keep = caption, expected a column of numbers, found string",
        ),
        (
            "[hashes, {name: image_duplicates, hashes: h2}]",
            "stages.image_duplicates needs the column h2_pixels_sha256, which no stage adds",
        ),
        (
            "[{name: hashes, as: h2}, {name: image_duplicates, by: [image_phash], hashes: h2}, pair_duplicates]",
            "stages.pair_duplicates needs the column caption_group, which no stage adds",
        ),
    ],
)
def test_stages_that_do_not_fit_together_are_refused_in_one_line(tmp_path, stages, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, f"stages={stages}", "strategies={no_filter: {}}", "compare=[no_filter]", "models={}")


def test_names_paths_and_placement_are_no_identity(tmp_path):
    def fingerprints(*overrides):
        plan = plan_of(tmp_path, *overrides)
        return {name: (step.kind, step.version, repr(step.values)) for name, step in plan.steps.items()}

    plain = fingerprints()
    placed = fingerprints(
        "cluster.clip={workers: 3, batch_size: 7}", "train.checkpoint_every_s=5", f"root={tmp_path}/b",
        "cluster.train={batch_size: 8}", "train.log_to=[tensorboard]",
    )  # fmt: skip
    assert placed == plain
    other = fingerprints("pool.shard_size=50", "recipes.tiny.lr=2e-3")
    assert {name for name in plain if other[name] != plain[name]} == {
        "pool", "model/scorer", *(name for name in plain if name.endswith("/train")),
    }  # fmt: skip


def test_an_alias_prefixes_columns_and_is_no_identity(tmp_path):
    aliased = "stages=[image_stats, caption_stats, language, hashes, {name: clip, as: judge, model: scorer}]"
    strategy = "strategies.basic_and_clip={top: {column: judge_clip_score, fraction: 0.5}}"
    plan = plan_of(tmp_path, aliased, strategy)
    assert plan.columns["judge_clip_score"] == ("judge", "clip_score")
    assert plan.steps["judge"].values == plan_of(tmp_path).steps["clip"].values


def test_what_a_strategy_uses_and_is_called(tmp_path):
    plan = plan_of(tmp_path, "strategies.control={random: {as_many_as: basic_and_clip}}", "compare=[no_filter, control, basic_and_clip, trusted_only, oracle]")  # fmt: skip
    labels = {name: account.label(plan, name) for name in plan.config.compare}
    assert labels == {"no_filter": "", "control": "", "basic_and_clip": "", "trusted_only": "reference", "oracle": "oracle"}  # fmt: skip
    assert account.uses(plan, "control") == []
    assert account.controls(plan) == {"basic_and_clip": "control"}
    assert account.uses(plan, "basic_and_clip") == ["model scorer: trained on trusted (tiny)"]
    assert account.uses(plan, "trusted_only") == ["reference trusted instead of the pool"]


def test_a_step_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(bytes(5000))
    (photos / "a.txt").write_text("a photo of nothing much")
    plan = plan_of(tmp_path, f"pool.source={photos}", "strategies.oracle={}")
    executor = execute.Executor(plan, None, None, str(tmp_path))
    statuses = states.resolve(plan)
    executor._check_disk(plan.steps["pool"], statuses)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 4000)
    with pytest.raises(StepError, match=r"pool: not enough disk at .*: it will write about 5.02kB, 4kB are free"):
        executor._check_disk(plan.steps["pool"], statuses)


def test_what_is_in_the_pool_needs_no_task(tmp_path):
    """configs/folder.yaml names tasks that a user need not have to look at a pool."""
    loaded = config.load(TINY, [f"root={tmp_path}/root", f"eval={{root: {tmp_path}, tasks: [cifar10]}}"])
    for until in ("stages", "pool"):
        plan = planning.build(loaded, TINY, until=until)
        assert "pool" in planning.targets(plan, until) or planning.targets(plan, until)[-1] == "profile"
        assert not any(step.kind in ("results", "task_images") for step in plan.steps.values())
    for until in (None, "clip", "no_filter"):
        with pytest.raises(ConfigError, match=r"eval\.tasks\.0 = cifar10: no files in"):
            planning.build(loaded, TINY, until=until)
    stages = "stages=[hashes, {name: contamination, against: tasks}]"
    overrides = [stages, "models={}", "strategies={no_filter: {}}", "compare=[no_filter]"]
    against = config.load(TINY, [f"root={tmp_path}/root", f"eval={{root: {tmp_path}, tasks: [cifar10]}}", *overrides])
    with pytest.raises(ConfigError, match=r"eval\.tasks\.0 = cifar10: no files in"):
        planning.build(against, TINY, until="stages")


def test_tasks_that_a_store_refuses_are_one_line(tmp_path, monkeypatch):
    """botocore's NoCredentialsError is no OSError."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"eval\.tasks: s3://bucket-of-r1/eval/cifar10 can't be read: no credentials"):
        plan_of(tmp_path, "eval={root: s3://bucket-of-r1/eval, tasks: [cifar10]}")


def test_images_of_a_published_task_that_would_fill_the_disk_are_refused(tmp_path, monkeypatch):
    """At 224 pixels those of DataComp's 40 tasks take 110 GB."""
    folder = write_files(
        tmp_path / "tasks" / "stl10",
        {
            "classnames.txt": "\n".join(f"class {number}" for number in range(10)) + "\n",
            "zeroshot_classification_templates.txt": "a photo of a {c}.\n",
            "test/nshards.txt": "1\n",
            "test/0.tar": bytes(10240),
        },
    )
    plan = plan_of(tmp_path, f"eval={{root: {pathlib.Path(folder).parent}, tasks: [stl10]}}")
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    outcome = run_here(plan, ["images/stl10"])
    # 8,000 images of 3 x 16 x 16 bytes
    assert re.search(
        r"images/stl10: not enough disk at .*: it will write about 6.14MB", outcome.failures["images/stl10"]
    )


class Dealing(EngineHere):
    """Remembers the tasks of each evaluation that it runs."""

    def __init__(self):
        self.dealt, self.labels = [], []

    def map(self, function, items, names, resources, on_done=None):
        if function is remote.evaluate_all:
            self.dealt.append([data.name for data in items[0][3]])
            self.labels += names
        return super().map(function, items, names, resources, on_done)


@pytest.mark.parametrize(("workers", "dealt"), [(1, [3]), (2, [1, 2]), (5, [1, 1, 1])])
def test_tasks_of_a_checkpoint_are_dealt_to_the_workers_of_eval(tmp_path, monkeypatch, workers, dealt):
    engine = Dealing()
    monkeypatch.setattr("tests.engine_fixture.EngineHere", lambda: engine)
    tasks = ["objects", "colours", "retrieval"]
    plan = plan_of(tmp_path, f"cluster.eval={{workers: {workers}}}", "compare=[no_filter]", f"eval.tasks={tasks}")
    # what they need first, so that all are ready together
    assert not run_here(plan, ["no_filter/seed0/train", *(f"images/{task}" for task in tasks)]).failures
    names = [f"no_filter/seed0/eval/{task}" for task in tasks]
    assert not run_here(plan, names).failures
    assert sorted(map(len, engine.dealt)) == dealt
    assert len(set(engine.labels)) == len(dealt)  # each is a line on the screen
    assert sorted(name for tasks_of_worker in engine.dealt for name in tasks_of_worker) == sorted(tasks)


def test_what_a_finished_step_is_to_others_is_found_once(tmp_path, monkeypatch):
    """Records of large pools are long, and states are looked at after every step of a run."""
    plan = plan_of(tmp_path, "pool.source.pairs=60", "models={}", "stages=[caption_stats]", "compare=[oracle, no_filter]",
                   "strategies={oracle: {}, no_filter: {}}")  # fmt: skip
    assert not run_here(plan, ["pool", "caption_stats"]).failures
    digested = []
    digest = artifact.content_digest
    monkeypatch.setattr(artifact, "content_digest", lambda record: digested.append(record["kind"]) or digest(record))
    first = states.resolve(plan)
    assert [first[name].state for name in ("pool", "oracle/selection", "no_filter/selection")] == [
        "done",
        "todo",
        "todo",
    ]
    assert digested.count("pool") == 1
    again = states.resolve(plan, first)
    assert digested.count("pool") == 1
    assert [status.artifact for status in again.values()] == [status.artifact for status in first.values()]


def test_secrets_in_urls_stay_out_of_what_is_written(tmp_path):
    plan = plan_of(tmp_path)
    source = "https://user:hunter2@host/pool.tar?X-Amz-Signature=abcdef&x=1"
    evaluation = plan.config.eval.model_copy(update={"root": source})
    text = runs.config_text(plan.config.model_copy(update={"eval": evaluation}))
    assert "https://host/pool.tar" in text
    assert "hunter2" not in text
    assert "abcdef" not in text
