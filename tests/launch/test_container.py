"""launch/container.sh and the Dockerfile."""

import json
import re

from tests.launch.stand_ins import LAUNCH, REPO, option, script


def test_the_container_runs_the_front_door():
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    values = {}
    for word, value in steps:
        values.setdefault(word, []).append(value)
    (base,) = values["FROM"]
    assert re.fullmatch(r"python:3\.\d+(\.\d+)?-slim-\w+", base)  # A tag that stays what it is.
    assert json.loads(values["ENTRYPOINT"][0]) == ["python", "-m", "refseg_jax.main"]
    assert steps[-1][0] == "ENTRYPOINT" and values["ARG"] == ["EXTRA=cuda"]
    assert any("pip install" in run and ".[$EXTRA]" in run for run in values["RUN"])
    assert set(values) == {"FROM", "ENV", "WORKDIR", "COPY", "ARG", "RUN", "ENTRYPOINT"}
    lines = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = [line for line in lines if not line.startswith("#")]
    assert allowed[0] == "*"  # Nothing goes in but what is named: no data, runs or credentials.
    for copy in values["COPY"]:
        *sources, _ = copy.split()
        for source in sources:
            assert (REPO / source).exists() and f"!{source.split('/')[0]}" in allowed
    copied = [c.split()[0] for c in values["COPY"]]
    assert {"configs", "refseg_jax"} <= set(copied)
    extras = (REPO / "pyproject.toml").read_text()
    assert "\ncuda = [" in extras and "\ntpu = [" in extras


def test_a_container_is_built_for_what_it_runs_on(tools):
    tag = "registry/refseg:1"
    tools.bash(*script("container.sh", "--for", "tpu", "--tag", tag, "--push"))
    build, push = tools.calls
    assert build[:2] == ["docker", "build"] and build[-1] == str(REPO)
    assert option(build, "build-arg") == "EXTRA=tpu" and option(build, "tag") == tag
    assert option(build, "file") == str(LAUNCH / "Dockerfile") and push == ["docker", "push", tag]
