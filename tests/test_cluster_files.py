"""The files of configs/cluster without a cluster: each against what its reader publishes, and against what they name.

rayjob.yaml: KubeRay's fields by a table of ours, pod templates by Kubernetes' own schemas (kubernetes-validate), and all
of it as Ray's autoscaler reads it. ray_up.yaml: Ray's schema. grafana.json: the metrics that are exported.
"""

from __future__ import annotations

import copy
import itertools
import json
import pathlib
import re
import shlex

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "configs" / "cluster"
PROJECT = (ROOT / "pyproject.toml").read_text()

# What may stand in a RayJob, from KubeRay's ray-operator/apis/ray/v1/{rayjob,raycluster}_types.go (1.6, the oldest that has
# all that is used here; 1.7 only adds). A type, a set of allowed values, [of each item], {"*": of each value}, or fields.
POD_TEMPLATE = "a pod template"
TEXTS = {"*": str}
GROUP = {"template": POD_TEMPLATE, "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS}
COUNTS = {"replicas": int, "minReplicas": int, "maxReplicas": int, "numOfHosts": int, "idleTimeoutSeconds": int}
QUANTITIES = {"limits": TEXTS, "requests": TEXTS}
RAY_CLUSTER_SPEC = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "authOptions": {"mode": {"token", "disabled"}, "secretName": str},
    "autoscalerOptions": {
        "version": {"v1", "v2"},
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "idleTimeoutSeconds": int,
        "resources": QUANTITIES,
    },
    "headGroupSpec": {**GROUP, "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"}, "enableIngress": bool},
    "workerGroupSpecs": [{**GROUP, **COUNTS, "groupName": str}],
}
RAY_JOB = {
    "apiVersion": {"ray.io/v1"},
    "kind": {"RayJob"},
    "metadata": {"name": str, "namespace": str, "labels": TEXTS, "annotations": TEXTS},
    "spec": {
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "submitterConfig": {"backoffLimit": int},
        "submitterPodTemplate": POD_TEMPLATE,
        "backoffLimit": int,
        "activeDeadlineSeconds": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "suspend": bool,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "rayClusterSpec": RAY_CLUSTER_SPEC,
    },
}
REQUIRED = {  # fields without which KubeRay's schema refuses the object
    ("headGroupSpec",): {"template"},
    ("workerGroupSpecs", "*"): {"groupName", "minReplicas", "maxReplicas", "template"},
}
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")


def problems(value, expected, place=()):
    """A line for each value that is not as expected, unknown fields among them."""
    name = ".".join(map(str, place))
    if expected == POD_TEMPLATE:
        yield from pod_problems(value, name)
    elif isinstance(expected, set):
        if value not in expected:
            yield f"{name} = {value!r}, expected one of {sorted(expected)}"
    elif isinstance(expected, type):
        if type(value) is not expected:
            yield f"{name} = {value!r}, expected {expected.__name__}"
    elif isinstance(expected, list):
        if not isinstance(value, list):
            yield f"{name} = {value!r}, expected a list"
            return
        for index, item in enumerate(value):
            yield from problems(item, expected[0], (*place, index))
    elif not isinstance(value, dict):
        yield f"{name} = {value!r}, expected fields"
    else:
        path = tuple("*" if isinstance(part, int) else part for part in place)
        for end, fields in REQUIRED.items():
            if path[-len(end) :] == end and (missing := fields - set(value)):
                yield f"{name}: {sorted(missing)} are missing"
        for key, inner in value.items():
            if key not in expected and "*" not in expected:
                yield f"{name}.{key}: KubeRay knows no such field"
                continue
            yield from problems(inner, expected.get(key, expected.get("*")), (*place, key))


def pod_problems(template, name):
    """What Kubernetes' schema refuses in a pod template, and what it leaves open: enumerations and quantities."""
    import kubernetes_validate

    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
    try:
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
        return
    spec = template["spec"]
    if spec.get("restartPolicy") not in ("Never", None):  # as autoscaler v2 wants it
        yield f"{name}: restartPolicy = {spec['restartPolicy']}, expected Never"
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    for container in spec["containers"]:
        resources = container["resources"]
        if resources["limits"] != resources["requests"]:
            yield f"{name}: requests are not the limits"
        sizes = [
            *resources["limits"].values(),
            *(v["emptyDir"]["sizeLimit"] for v in volumes.values() if "emptyDir" in v),
        ]
        yield from (f"{name}: {size!r} is no quantity" for size in sizes if not QUANTITY.fullmatch(size))
        shm = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        if [volumes.get(mount, {}).get("emptyDir", {}).get("medium") for mount in shm] != ["Memory"]:
            yield f"{name}: /dev/shm is no memory"


def job_problems(documents):
    """Everything that is wrong with the documents of rayjob.yaml."""
    accounts = {one["metadata"]["name"] for one in documents if one["kind"] == "ServiceAccount"}
    (job,) = [one for one in documents if one["kind"] == "RayJob"]
    yield from problems(job, RAY_JOB)
    spec, cluster = job["spec"], job["spec"].get("rayClusterSpec", {})
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    # What KubeRay's controllers refuse beyond the schema (utils/validation.go).
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"
    if len(job["metadata"]["name"]) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"]):
        yield "metadata.name is no DNS label of at most 47 characters"
    if "mode" in cluster.get("authOptions", {}) and not cluster.get("rayVersion"):
        yield "authOptions needs rayVersion"
    for group in groups:
        taken = {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"])
        if "labels" in group["rayStartParams"] or (taken and group.get("resources")):
            yield f"rayStartParams of {group.get('groupName', 'the head')}: KubeRay refuses them beside its own fields"
        if group["template"]["spec"].get("serviceAccountName") not in accounts:
            yield f"{group.get('groupName', 'the head')}: its service account is not in this file"


@pytest.fixture
def documents():
    return list(yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text()))


def head(documents):
    return documents[1]["spec"]["rayClusterSpec"]["headGroupSpec"]


def worker(documents, index=0):
    return documents[1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][index]


def container(group):
    return group["template"]["spec"]["containers"][0]


def test_the_rayjob_is_as_kuberay_and_kubernetes_want_it(documents):
    import kubernetes_validate

    assert list(job_problems(documents)) == []
    assert [one["kind"] for one in documents] == ["ServiceAccount", "RayJob"]
    kubernetes_validate.validate(documents[0], kubernetes_validate.latest_version(), strict=True)


BREAKS = {
    "an unknown field": lambda docs: docs[1]["spec"].update(backofflimit=3),
    "a field in the wrong place": lambda docs: docs[1]["spec"].update(rayVersion="2.60.0"),
    "a number as text": lambda docs: docs[1]["spec"].update(backoffLimit="3"),
    "no such value": lambda docs: docs[1]["spec"].update(submissionMode="K8sJob"),
    "a version as a number": lambda docs: docs[1]["spec"]["rayClusterSpec"].update(rayVersion=2.6),
    "a ttl without an end": lambda docs: docs[1]["spec"].pop("shutdownAfterJobFinishes"),
    "tokens without a version": lambda docs: docs[1]["spec"]["rayClusterSpec"].pop("rayVersion"),
    "an environment that is no mapping": lambda docs: docs[1]["spec"].update(runtimeEnvYAML="- a"),
    "a group without a name": lambda docs: worker(docs).pop("groupName"),
    "a misspelt count": lambda docs: worker(docs).update(maxreplicas=3),
    "start parameters that are no text": lambda docs: head(docs)["rayStartParams"].update({"num-cpus": 0}),
    "labels in start parameters": lambda docs: worker(docs)["rayStartParams"].update(labels="a=b"),
    "an unknown pod field": lambda docs: worker(docs)["template"]["spec"].update(serviceAccount_name="a"),
    "an unknown container field": lambda docs: container(worker(docs, 1)).update(images="a"),
    "a container without a name": lambda docs: container(head(docs)).pop("name"),
    "seconds as text": lambda docs: worker(docs)["template"]["spec"].update(terminationGracePeriodSeconds="120"),
    "no quantity": lambda docs: container(worker(docs))["resources"].update(limits={"cpu": "many"}, requests={"cpu": "many"}),
    "requests below the limits": lambda docs: container(worker(docs))["resources"]["requests"].update(cpu="1"),
    "no memory as /dev/shm": lambda docs: worker(docs)["template"]["spec"]["volumes"][0]["emptyDir"].pop("medium"),
    "a pod that is restarted": lambda docs: worker(docs)["template"]["spec"].update(restartPolicy="Always"),
    "an account that is nowhere": lambda docs: worker(docs)["template"]["spec"].update(serviceAccountName="b"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_rayjob_is_refused(documents, broken):
    documents = copy.deepcopy(documents)  # anchors make one object of several
    documents = json.loads(json.dumps(documents))
    BREAKS[broken](documents)
    assert list(job_problems(documents)) != []


def test_rays_autoscaler_reads_the_groups_as_they_are_meant(documents):
    from ray.autoscaler._private.kuberay import autoscaling_config

    read = autoscaling_config._derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "winnow", "namespace": "default"}, "spec": documents[1]["spec"]["rayClusterSpec"]}
    )
    types = read["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0  # no step works beside the driver
    assert (types["cpu"]["min_workers"], types["gpu"]["min_workers"]) == (0, 0)
    assert types["cpu"]["max_workers"] > 1 < types["gpu"]["max_workers"]
    assert "GPU" not in types["cpu"]["resources"] and types["gpu"]["resources"]["GPU"] >= 1
    assert types["cpu"]["labels"]["market"] == types["gpu"]["labels"]["market"] == "spot"


def test_the_head_is_on_demand_and_workers_are_on_spot_and_have_time_to_leave(documents):
    def rules(group):
        affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
        terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        return {(rule["key"], rule["operator"], *rule["values"]) for term in terms for rule in term["matchExpressions"]}

    wanted = {(key, "In", *values) for key, _, *values in rules(head(documents))}
    for group in (worker(documents, 0), worker(documents, 1)):
        assert rules(group) == wanted and all(operator == "NotIn" for _, operator, *_ in rules(head(documents)))
        (drain,) = [
            one["value"] for one in container(group)["env"] if one["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        ]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > float(drain)


def test_the_variable_for_the_drain_is_one_of_rays():
    from ray._private import ray_constants

    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")


def commands():
    """(file, words) of each command line of winnow in the files here and in their comments."""
    for path in sorted(CLUSTER.iterdir()):
        text = path.read_text().replace("\\\n#", "")
        for line in re.findall(r"python (pipeline/run\.py .*)", text):
            yield path.name, shlex.split(line)


def test_the_commands_are_ones_that_winnow_takes():
    from pipeline import run
    from pipeline.core import config

    found = list(commands())
    assert {name for name, _ in found} == {"ray_up.yaml", "rayjob.yaml"}
    for _, (script, *arguments) in found:
        assert (ROOT / script).is_file()
        options = run.parser().parse_args(arguments)
        loaded = config.load(str(ROOT / options.config), options.overrides)
        assert loaded.root.startswith("s3://")


def test_the_image_has_what_the_stages_of_the_commands_need(monkeypatch):
    """A stage without its package fails the run, and a failed RayJob makes a new cluster."""
    import importlib.util

    from pipeline.core import config
    from stages import build_stage

    sync = next(words for name, words in instructions() if name == "RUN" and "sync" in words)
    extras = {word for before, word in itertools.pairwise(sync) if before == "--extra"}
    modules = {"gcld3": "cld3", "rensa": "rensa"}  # that are in an extra of pyproject.toml, which `dev` has as well
    assert set(modules.values()) <= set(re.findall(r"(?m)^(\w+) = \[\"", PROJECT))
    missing = {module for module, extra in modules.items() if extra not in extras}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more))
    for _, (_, *arguments) in commands():
        name = arguments[arguments.index("--config") + 1]
        named = [entry for entry in config.load(str(ROOT / name)).stages if isinstance(entry, str)]  # need no assets
        stages = [build_stage(entry, {}, name) for entry in named]
        assert stages and not any(stage.unavailable() for stage in stages)


def test_the_job_runs_in_the_folder_that_the_image_has(documents):
    working_dir = yaml.safe_load(documents[1]["spec"]["runtimeEnvYAML"])["working_dir"]
    assert working_dir == next(words for name, words in instructions() if name == "WORKDIR")[0]
    images = {container(group)["image"] for group in (head(documents), worker(documents), worker(documents, 1))}
    assert images == {ray_up()["docker"]["image"]}  # all of one Ray


def ray_up():
    return yaml.safe_load((CLUSTER / "ray_up.yaml").read_text())


def test_ray_up_is_as_rays_schema_wants_it():
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(ray_up())
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"] == {"CPU": 0}
    markets = {
        name: kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for name, kind in types.items()
    }
    assert markets.pop("head") is None and set(markets.values()) == {"spot"}
    assert all(kind["min_workers"] == 0 for kind in types.values())
    assert prepared["max_workers"] == sum(kind["max_workers"] for kind in types.values())
    assert not prepared["setup_commands"]  # all is in the image


@pytest.mark.parametrize(
    "broken",
    [
        lambda found: found.update(workers=3),
        lambda found: found["available_node_types"]["cpu"].update(maxworkers=3),
        lambda found: found["available_node_types"]["cpu"]["resources"].update(CPU="16"),
        lambda found: found["available_node_types"]["cpu"].pop("node_config"),
        lambda found: found["docker"].update(images="a"),
        lambda found: found["auth"].update(user="a"),
        lambda found: found.update(head_start_ray_commands="ray start"),
    ],
)
def test_a_broken_ray_up_is_refused(broken):
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    found = {"cluster_synced_files": [], **ray_up()}
    validate_config(found)
    broken(found)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(found)


INSTRUCTIONS = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER"}


def instructions():
    """[(instruction, its words)] of the Dockerfile, with continued lines joined."""
    text = "\n".join(line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines]


def test_the_dockerfile_copies_what_is_there_and_all_of_it():
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS and found[0][0] == "FROM"
    copied = [source for name, words in found if name == "COPY" for source in words[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    packages = re.findall(r'"(\w+)\*"', re.search(r"(?m)^include = (.*)$", PROJECT).group(1))
    assert {source.rstrip("/") for source in copied} == {
        *packages,
        "configs",
        "pyproject.toml",
    }


def test_the_dockerfile_builds_an_image_of_a_user_and_without_test_packages():
    found = instructions()
    base = next(words for name, words in found if name == "FROM")[0]
    version = tuple(map(int, re.fullmatch(r"python:(\d+)\.(\d+)-slim", base).groups()))
    low, high = re.search(r'requires-python = ">=(\d+\.\d+),<(\d+\.\d+)"', PROJECT).groups()
    assert tuple(map(int, low.split("."))) <= version < tuple(map(int, high.split(".")))
    users = [index for index, (name, _) in enumerate(found) if name == "USER"]
    assert found[users[-1]] == ("USER", ["ray"]) and all(name != "RUN" for name, _ in found[users[-1] :])
    sync = next(words for name, words in found if name == "RUN" and "sync" in words)
    assert "--no-dev" in sync and "language-model" in re.search(r"default-groups = (.*)", PROJECT).group(1)
    variables = dict(word.split("=", 1) for name, words in found if name == "ENV" for word in words)
    assert (variables["RAY_ENABLE_UV_RUN_RUNTIME_ENV"], variables["OMP_NUM_THREADS"]) == ("0", "1")
    assert variables["HOME"] == "/opt/ray"  # `ray up` mounts what it brings there, and asks only the image
    # The packages come before the code: a change of code rebuilds no layer of them.
    order = [words[0] for name, words in found if name in ("COPY", "RUN")]
    assert order.index("pyproject.toml") < order.index("uv") < order.index("pipeline/")


def test_the_image_and_the_cluster_have_a_ray_that_the_project_allows(documents):
    least = re.search(r'"ray\[.*\]>=([\d.]+)"', PROJECT).group(1)
    version = documents[1]["spec"]["rayClusterSpec"]["rayVersion"]
    assert [int(part) for part in version.split(".")] >= [int(part) for part in least.split(".")]


GRAFANA = json.loads((CLUSTER / "grafana.json").read_text())
METRIC = re.compile(r"\b(?:ray|autoscaler)_[a-z0-9_]+\b")


def targets(board):
    return [(panel, target) for panel in board["panels"] for target in panel.get("targets", ())]


def exported():
    """{name in Prometheus: labels} of what pipeline/core/engine.py exports: Ray adds `ray_`, and `_total` to counters."""
    text = (ROOT / "pipeline" / "core" / "engine.py").read_text()
    made = re.findall(r"metrics\.(Counter|Gauge)\(\s*\"(\w+)\",[^(]*\(([^)]*)\)", text)
    return {
        f"ray_{name}" + "_total" * (kind == "Counter"): set(re.findall(r'"(\w+)"', tags)) for kind, name, tags in made
    }


def unknown_metrics(board):
    from ray.dashboard.modules.metrics import dashboards

    folder = pathlib.Path(dashboards.__file__).parent
    rays = set(METRIC.findall("".join(path.read_text() for path in folder.glob("*.py"))))
    own = exported()
    for panel, target in targets(board):
        for metric in METRIC.findall(target["expr"]):
            if metric not in own and metric not in rays:
                yield f"{panel['title']}: {metric}"
        used = set(re.findall(r"by \(([^)]*)\)", target["expr"]))
        labels = {label.strip() for group in used for label in group.split(",")}
        for metric in set(METRIC.findall(target["expr"])) & set(own):
            yield from (f"{panel['title']}: {metric} has no {label}" for label in labels - own[metric])


def test_the_dashboard_shows_metrics_that_are_there_and_all_of_ours():
    assert list(unknown_metrics(GRAFANA)) == []
    shown = {metric for _, target in targets(GRAFANA) for metric in METRIC.findall(target["expr"])}
    assert exported().keys() <= shown
    assert len(exported()) >= 5


@pytest.mark.parametrize("change", [("ray_winnow_units_total", "ray_winnow_units"), ("by (step)", "by (shard)"), ("ray_resources", "ray_cpus")])  # fmt: skip
def test_a_dashboard_of_other_metrics_is_refused(change):
    assert list(unknown_metrics(json.loads(json.dumps(GRAFANA).replace(*change)))) != []


def test_the_dashboard_is_one_that_grafana_imports():
    """The fields that Grafana's import reads, and that nothing in it names what is not there."""
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(GRAFANA)
    assert isinstance(GRAFANA["schemaVersion"], int) and GRAFANA["schemaVersion"] >= 36  # data sources are objects
    ids = [panel["id"] for panel in GRAFANA["panels"]]
    assert len(ids) == len(set(ids))
    variables = {entry["name"] for entry in GRAFANA["templating"]["list"]}
    assert (
        next(entry for entry in GRAFANA["templating"]["list"] if entry["type"] == "datasource")["query"] == "prometheus"
    )
    taken = set()
    for panel in GRAFANA["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        assert panel["type"] in ("row", "timeseries")
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(references) == len(set(references))
    for panel, target in targets(GRAFANA):
        assert panel["datasource"] == target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        named = {name for name in re.findall(r"\$\{?(\w+)", target["expr"]) if not name.startswith("__")}
        assert named <= variables, panel["title"]
        assert target["expr"].count("(") == target["expr"].count(")") and target["expr"].count("{") == target[
            "expr"
        ].count("}")


def test_the_guide_names_what_is_there():
    from pipeline.core.config import Resources
    from pipeline.plan import STEPS_OF_CLUSTER
    from stages import STAGES

    guide = (ROOT / "docs" / "cluster.md").read_text()
    for block in re.findall(r"(?s)```yaml\n(.*?)```", guide):
        for step, values in yaml.safe_load(block)["cluster"].items():
            assert step in STEPS_OF_CLUSTER or step in STAGES
            Resources.model_validate(values)
    assert set(Resources.model_fields) <= set(re.findall(r"`(\w+)`", guide))
    assert exported().keys() == set(re.findall(r"`(ray_winnow_\w+)\{", guide))
    named = set(re.findall(r"configs/cluster/(\w+(?:\.\w+)?)", guide))
    assert named == {path.name for path in CLUSTER.iterdir()}
