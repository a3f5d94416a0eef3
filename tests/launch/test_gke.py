"""launch/gke.sh: the JobSet that it hands to Kubernetes."""

import re

import pytest
import yaml

from tests.launch.stand_ins import GPU, TPU, TRAINING, script

# A mapping has these keys and no others (a "?" at the end: or not), a list has items such as its
# only one, <int> and <str> are types; all else is as it stands here. The fields are those of JobSet
# v1alpha2 (in which, until 0.10, a pod's condition needs a status), Job batch/v1 and the pod of
# core/v1.
SCHEMA = """
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: <str>
  annotations?:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: <int>
    rules:
    - name: <str>
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        completions: <int>
        parallelism: <int>
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onPodConditions?: [{type: DisruptionTarget, status: "True"}]
            onExitCodes?: {operator: In, values: [143]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: <int>
            serviceAccountName: <str>
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator?: <str>
              cloud.google.com/gke-tpu-topology?: <str>
              cloud.google.com/gke-accelerator?: <str>
              cloud.google.com/gke-spot?: "true"
            containers:
            - name: <str>
              image: <str>
              securityContext?: {privileged: true}
              env?: [{name: <str>, value: <str>}]
              args: [<str>]
              resources:
                limits:
                  google.com/tpu?: <int>
                  nvidia.com/gpu?: <int>
              volumeMounts: [{name: memory, mountPath: /dev/shm}]
            volumes: [{name: memory, emptyDir: {medium: Memory}}]
"""


def check(value, schema, path=""):
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        known = {key.removesuffix("?"): part for key, part in schema.items()}
        missing = {key for key in schema if not key.endswith("?")} - value.keys()
        assert value.keys() <= known.keys() and not missing, f"{path}: {set(value)}"
        for key, part in value.items():
            check(part, known[key], f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for item in value:
            check(item, schema[0], f"{path}[]")
    else:
        expected = {"<int>": int, "<str>": str}.get(schema, type(schema))
        assert type(value) is expected, f"{path}: {value!r}"
        assert schema in ("<int>", "<str>", value), f"{path}: {value!r}"


def jobset(tools, *arguments):
    """The document, the Job's and the pod's spec, the container, and the words it runs with."""
    tools.bash(*script("gke.sh", *arguments, "--", *TRAINING))
    before, call = tools.calls
    assert before[:4] == ["kubectl", "delete", "jobset", "run"]
    assert "--ignore-not-found" in before and "--cascade=foreground" in before  # Its pods are gone.
    assert call[:-1] == ["kubectl", "create", "--filename", "-"]
    document = yaml.safe_load(call[-1])
    check(document, yaml.safe_load(SCHEMA))
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    # Of a rule, Kubernetes takes one of the two.
    rules = [rule.keys() - {"action"} for rule in job["podFailurePolicy"]["rules"]]
    assert rules == [{"onPodConditions"}, {"onExitCodes"}]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # Kubernetes expands $(NAME), and reads $$ as $.
    words = [re.sub(r"\$\$", "$", word) for word in container["args"]]
    return document, job, pod, container, words


@pytest.mark.parametrize(
    "arguments, hosts, chips",
    [
        (["--topology", "4x4"], 4, 4),
        (["--topology", "2x2x4"], 4, 4),
        (["--topology", "2x4", "--chips", "8"], 1, 8),
        (["--topology", "16x16", "--spot"], 64, 4),
    ],
)
def test_a_slice_has_a_pod_on_every_host(arguments, hosts, chips, tools):
    document, job, pod, container, words = jobset(tools, *TPU, *arguments)
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    selector = pod["nodeSelector"]
    assert selector.pop("cloud.google.com/gke-tpu-accelerator") == "tpu-v5-lite-podslice"
    assert selector.pop("cloud.google.com/gke-tpu-topology") == arguments[1]
    assert list(selector) == ["cloud.google.com/gke-spot"] * ("--spot" in arguments)
    assert container["image"] == "registry/refseg:1" and document["metadata"]["name"] == "run"
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert words == TRAINING  # GKE tells JAX the rest.
    assert all("$" not in word.replace("$$", "") for word in container["args"])


def test_pods_have_the_environment(tools):
    variables = ["JAX_COMPILATION_CACHE_DIR=gs://bucket/it's", "XLA_FLAGS=--a=$(b) --c", "EMPTY="]
    words = [word for variable in variables for word in ("--env", variable)]
    *_, container, _ = jobset(tools, *GPU, *words)
    env = {entry["name"]: entry["value"].replace("$$", "$") for entry in container["env"]}
    assert env == dict(variable.split("=", 1) for variable in variables)


def test_gpu_pods_are_told_where_they_are(tools):
    _, job, pod, container, words = jobset(tools, *GPU, "--restarts", "4")
    assert job["parallelism"] == job["completions"] == 3
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert words[: len(TRAINING)] == TRAINING
    assert words[len(TRAINING) :] == [
        "--coordinator", "run-workers-0-0.run:8476", "--num_processes", "3",
        "--process_id", "$(JOB_COMPLETION_INDEX)",
    ]  # fmt: skip
