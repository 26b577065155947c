"""The launchers: scripts pass shellcheck, manifests fit their schemas once filled in, every variable is explained.

Kubernetes' own kinds are checked against its published schemas, the Ray cluster file against Ray's. PyTorchJob and RayCluster
are checked by their pod templates, and by the names of their own fields; with GDD_CRDS=DIR, a directory that holds their
CustomResourceDefinitions, against these too.
"""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from gdd_dist.runtime.signals import LONGEST_GRACE

SHELLCHECK = str(Path(sys.executable).parent / "shellcheck")  # from the dev extra; PATH need not hold the environment


FOLDER = Path(__file__).parents[2] / "launchers"
SCRIPTS = [*sorted(FOLDER.glob("*.sh")), FOLDER / "slurm.sbatch"]
KUBERNETES = "1.30"
TORCHRUN_KILLS_AFTER = 30.0
OWN_FIELDS = {
    "PyTorchJob": {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs", "elasticPolicy"},
    "RayCluster": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"},
}


def variables():
    """kubernetes.env and what its readers are told to add."""
    lines = [line for line in (FOLDER / "kubernetes.env").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines) | {"GDD_WORKERS": "1"}


def filled(name, **values):
    """The documents of a manifest; fails for a variable that nobody sets."""
    return list(yaml.safe_load_all(substituted((FOLDER / name).read_text(), variables() | values)))


def substituted(text, values):
    """As envsubst does it."""
    return re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], text)


def documents():
    return [
        (f.name, doc) for f in sorted(FOLDER.glob("*.yaml")) if f.name != "ray-cluster.yaml" for doc in filled(f.name)
    ]


def pod_templates(tree):
    """All pod templates in a manifest."""
    if isinstance(tree, dict):
        return ([tree["template"]] if "template" in tree else []) + [t for v in tree.values() for t in pod_templates(v)]
    return [t for v in tree for t in pod_templates(v)] if isinstance(tree, list) else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_pass_shellcheck_and_can_be_run(script):
    found = subprocess.run([SHELLCHECK, str(script)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert os.access(script, os.X_OK)


def test_shellcheck_finds_what_is_wrong(tmp_path):
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/bin/sh\nrm $1\n")
    assert subprocess.run([SHELLCHECK, str(bad)], capture_output=True).returncode == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_every_variable_of_a_script_is_explained_in_it(script):
    text = script.read_text()
    comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", text)) - {"PATH"}
    assert {name for name in used if not name.startswith("SLURM_") and name not in comment} <= {
        "DS_ACCELERATOR",
        "PORT",
    }


@pytest.mark.parametrize(("name", "doc"), documents(), ids=lambda v: v if isinstance(v, str) else v["kind"])
def test_manifests_fit_their_schemas(name, doc):
    if doc["kind"] in OWN_FIELDS:
        assert doc["spec"].keys() <= OWN_FIELDS[doc["kind"]]
        templates = pod_templates(doc)
        assert len(templates) == 2
        for template in templates:  # a pod template is a Pod without its kind
            pod = copy.deepcopy(template)
            pod["spec"]["restartPolicy"] = "Never"
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(doc, KUBERNETES, strict=True)


def test_a_schema_finds_what_is_wrong():
    service = next(d for n, d in documents() if d["kind"] == "Service")
    service["spec"]["clusterIp"] = "None"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, KUBERNETES, strict=True)


@pytest.mark.skipif("GDD_CRDS" not in os.environ, reason="GDD_CRDS names no directory of CustomResourceDefinitions")
@pytest.mark.parametrize("kind", OWN_FIELDS)
def test_custom_resources_fit_their_definitions(kind):
    doc = next(d for _, d in documents() if d["kind"] == kind)
    crds = [yaml.safe_load(p.read_text()) for p in Path(os.environ["GDD_CRDS"]).glob("*.yaml")]
    crd = next(c for c in crds if c["spec"]["names"]["kind"] == kind)
    version = next(v for v in crd["spec"]["versions"] if doc["apiVersion"].endswith(f"/{v['name']}"))
    jsonschema.validate(doc, closed(version["schema"]["openAPIV3Schema"]))


def closed(schema):
    """A schema that refuses unknown fields, as the API server's strict check does."""
    if isinstance(schema, list):
        return [closed(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {k: closed(v) for k, v in schema.items()}
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    fields = out.get("properties")
    if isinstance(fields, dict) and out.get("type") == "object" and not out.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    return out


def test_the_jobs_pods_find_each_other():
    """Pod 0's name is NAME-0.SERVICE: the service, the subdomain and the endpoint must agree."""
    service, job = filled("kubernetes-indexed-job.yaml", GDD_NAME="x", GDD_NODES="4", GDD_GPUS="2")
    template = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == template["spec"]["subdomain"] == "x"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    args = template["spec"]["containers"][0]["args"]
    assert {"--nnodes=4", "--nproc_per_node=2", "--rdzv_endpoint=x-0.x:29500"} <= set(args)


def test_the_ray_cluster_file_fits_rays_schema():
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    text = (FOLDER / "ray-cluster.yaml").read_text()
    names = {"RAY_HEAD": "10.0.0.1", "RAY_WORKERS": "10.0.0.2,10.0.0.3", "RAY_USER": "me", "GDD_DIR": "/shared/gdd"}
    doc = yaml.safe_load(substituted(text, names))
    jsonschema.validate(doc, schema)
    assert doc["provider"]["worker_ips"] == ["10.0.0.2", "10.0.0.3"]


def test_the_readme_names_every_launcher():
    text = (FOLDER / "README.md").read_text()
    assert [p.name for p in FOLDER.iterdir() if p.name not in text and p.name != "README.md"] == []


STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "$@" >> calls; kill -KILL $PPID; fi',
    "scancel": 'echo "$@" >> calls; kill -TERM "$(cat step)"',
    "srun": 'trap "exit 1" TERM; echo $$ > step; echo "$@" > called; for _ in $(seq 1 200); do sleep 0.05; done',
}


@pytest.fixture
def batch(tmp_path):
    """Starts slurm.sbatch with SLURM's programs replaced by stubs that write down how they were called."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def start(srun=None, out="/o", **env):
        if srun is not None:
            (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\n{srun}\n")
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "/d", "OUT": str(out)}
        command = [str(FOLDER / "slurm.sbatch"), "--seed", "3"]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | slurm | path | env)

    return start


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["time is nearly over", "preempted"])
def test_slurm_queues_a_job_again_that_had_to_stop(batch, tmp_path, number):
    job = batch()
    end = time.monotonic() + 30
    while not (tmp_path / "called").exists() and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(number)
    job.wait(timeout=240)
    assert (tmp_path / "calls").read_text().split("\n")[:2] == ["--signal=TERM 7.0", "requeue 7"]
    called = (tmp_path / "called").read_text()
    assert "--nnodes=2 --nproc_per_node=4" in called
    assert "--rdzv_endpoint=node1:20007" in called
    assert called.strip().endswith("-m gdd_dist.train --data /d --out /o --seed 3")


@pytest.mark.parametrize("status", [0, 1])
def test_slurm_does_not_queue_a_job_again_that_ended_by_itself(batch, tmp_path, status):
    assert batch(srun=f"exit {status}").wait(timeout=240) == status
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("before", [False, True], ids=["", "and what an earlier job left is none of its own"])
def test_slurm_looks_for_what_ranks_leave_that_were_preempted_when_it_was_told_nothing_itself(batch, tmp_path, before):
    note = tmp_path / "preempted"
    if before:
        note.touch()
    job = batch(srun="exit 1" if before else f"touch {note}; exit 1", out=tmp_path)
    job.wait(timeout=240)
    assert (tmp_path / "calls").exists() != before
    assert note.exists() != before


def test_pods_have_longer_to_save_than_ranks_take_to_agree_and_to_leave():
    pods = [t["spec"] for name, doc in documents() if "ray" not in name for t in pod_templates(doc)]
    assert len(pods) == 3
    assert all(pod["terminationGracePeriodSeconds"] > 2 * LONGEST_GRACE + TORCHRUN_KILLS_AFTER for pod in pods)


@pytest.mark.parametrize("name", ["torchrun_one_node.sh", "torchrun_many_nodes.sh", "slurm.sbatch", "Dockerfile"])
def test_whoever_starts_torchrun_has_it_pass_sigusr1_on(name):
    text = (FOLDER / name).read_text()
    found = re.search(r"(?:--signals-to-handle|^ENV PET_SIGNALS_TO_HANDLE)=(\S+)", text, re.MULTILINE)
    assert found is not None
    assert set(found[1].split(",")) == {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"}


@pytest.mark.parametrize("name", ["torchrun_many_nodes.sh", "Dockerfile"])
def test_where_ranks_are_started_anew_a_host_that_comes_back_finds_their_store(name):
    """What torchrun shares between rounds it names in the first alone (torch 2.14): a newcomer would wait for it in vain."""
    text = (FOLDER / name).read_text()
    assert re.search(r"^(export|ENV) TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("gpus", "visible", "cores", "ranks"),
    [
        (0, None, 2, 2),
        (0, None, 3, 2),
        (0, None, 64, 8),
        (0, None, 1, 1),
        (1, None, 64, 1),
        (3, None, 64, 2),
        (4, None, 2, 4),
        (16, None, 64, 8),
        (8, "0,3", 64, 2),
        (8, "", 4, 4),
        (8, "-1", 4, 4),
    ],
)
def test_make_train_starts_as_many_ranks_as_fit(tmp_path, gpus, visible, cores, ranks):
    listed = "".join(f"echo 'GPU {i}: NVIDIA (UUID: GPU-{i})'\n" for i in range(gpus))
    for name, body in {
        "nvidia-smi": listed or "echo NVIDIA-SMI has failed; exit 9\n",
        "nproc": f"echo {cores}\n",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}")
        (tmp_path / name).chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "RANKS", "MAKEFLAGS")}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    for more, wanted in (([], ranks), (["RANKS=5"], 5)):
        command = ["make", "--dry-run", "train", *more]
        said = subprocess.run(command, cwd=FOLDER.parent, env=env, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"--nproc_per_node=(\d*) ", said) == [str(wanted)]
