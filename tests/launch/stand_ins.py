"""What the tests of the launch scripts share: a shell in which the clouds' tools are stand-ins.

A stand-in writes down how it was called and gives the answer that it was told to give. That a cloud
takes what the scripts ask for is not tested here.
"""

import json
import pathlib
import shutil
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
BASH = shutil.which("bash")
SCRIPTS = sorted(p.name for p in LAUNCH.glob("*.sh") if p.name != "common.sh")
TIMEOUT = 240  # Seconds; far beyond what anything takes, so that a hang ends.
BUCKET = "gs://bucket/run 1"
# What a shell, YAML, Kubernetes or systemd would spoil if it were not quoted.
TRAINING = [
    "--config",
    "configs/alignformer.py:refcoco,small",
    f"--workdir={BUCKET}",
    '--config.data.root=gs://bucket/it\'s "mine" & yours',
    "--config.optim.groups=((r'(scale|bias)$', 1.0, 0.0), ('$(HOME)$$ %h #', 0.1, 1.0))",
]
POD = ["--name", "pod", "--zone", "us-west4-a"]
KIND = ["--type", "v5litepod-16", "--runtime", "v2-alpha-tpuv5-lite"]
JOBSET = ["--name", "run", "--image", "registry/refseg:1"]
TPU = [*JOBSET, "--accelerator", "tpu-v5-lite-podslice"]
GPU = [*JOBSET, "--accelerator", "nvidia-l4", "--hosts", "3", "--gpus", "8"]
# All that the scripts may use of a machine; the real tools of a cloud are never within reach.
PLAIN = ("awk", "bash", "cat", "dirname", "env", "gzip", "id", "mkdir", "sh", "sleep", "tar")
TOOLS = ("docker", "gcloud", "kubectl", "sbatch", "scancel", "scontrol", "srun", "sudo")

STAND_IN = """#!{python} -SE
import json, os, pathlib, sys, time
name, calls = os.path.basename(sys.argv[0]), pathlib.Path(os.environ["CALLS"])
stdin = sys.stdin.read() if name == "kubectl" else ""
with calls.open("a") as file:
    file.write(json.dumps([name, *sys.argv[1:], *([stdin] if stdin else [])]) + "\\n")
answers = pathlib.Path(os.environ["ANSWERS"])
left = json.loads(answers.read_text()) if answers.exists() else []
for i, (words, text, status) in enumerate(left):
    if words in " ".join([name, *sys.argv[1:]]):
        answers.write_text(json.dumps(left[:i] + left[i + 1 :]))
        print(text)
        sys.exit(status)
"""


class Tools:
    """Stand-ins of the clouds' tools: `calls` has the words of every call, in order."""

    def __init__(self, folder: pathlib.Path, plain: pathlib.Path):
        self.folder = folder
        self.path = f"{folder / 'bin'}:{plain}"
        self._calls, self._answers = folder / "calls", folder / "answers"
        self.environ = {"CALLS": str(self._calls), "ANSWERS": str(self._answers)}
        for name in TOOLS:
            tool = folder / "bin" / name
            tool.parent.mkdir(exist_ok=True)
            tool.write_text(STAND_IN.format(python=sys.executable))
            tool.chmod(0o755)
        (folder / "bin" / "sleep").symlink_to(shutil.which("true"))

    def answer(self, *answers: tuple[str, str, int]) -> None:
        """(words, text, exit status): for the next call with `words` in it, once."""
        self._answers.write_text(json.dumps(answers))

    @property
    def calls(self) -> list[list[str]]:
        """The calls so far; they are forgotten."""
        if not self._calls.exists():
            return []
        lines = self._calls.read_text().splitlines()
        self._calls.unlink()
        return [json.loads(line) for line in lines]

    def bash(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """Runs bash where the tools are the stand-ins."""
        done = bash(*arguments, path=self.path, **self.environ)
        assert not check or done.returncode == 0, done.stderr
        return done


def bash(*arguments, path, **environ):
    return subprocess.run(
        [BASH, *arguments], capture_output=True, text=True, timeout=TIMEOUT, cwd=REPO,
        env={"PATH": path, "HOME": "/nowhere", "PYTHON": sys.executable, **environ},
    )  # fmt: skip


def script(name, *arguments):
    return [str(LAUNCH / name), *arguments]


def option(call, name):
    """The value of --name=value in a call."""
    (value,) = [word.partition("=")[2] for word in call if word.startswith(f"--{name}=")]
    return value
