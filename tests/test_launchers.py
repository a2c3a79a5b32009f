"""The launchers, with stand-ins for gcloud, ssh, srun and Python that write down what they are asked."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from source import REPOSITORY

LAUNCHERS = REPOSITORY / "train" / "launchers"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a program of that name first on the path; its body is bash. Calls are lines of `calls`."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("STATE", str(tmp_path))
    monkeypatch.setenv("WAIT", "0")
    monkeypatch.setenv("POLL", "0.05")
    (tmp_path / "calls").touch()

    def make(name: str, body: str = "") -> None:
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
        file.chmod(0o755)

    return make


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def run(script: str, *words: str) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCHERS / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# Answers what `describe` is asked with the next state each time, and fails the first training.
GCLOUD = r"""
case "$*" in
  *describe*) n=$(cat "$STATE/n" 2>/dev/null || echo 0); echo $((n + 1)) >"$STATE/n"
    states=("" WAITING_FOR_RESOURCES PROVISIONING ACTIVE SUSPENDED "" ACTIVE); echo "${states[n]}" ;;
  *pretrain*) [[ -e "$STATE/failed" ]] || { touch "$STATE/failed"; exit 255; } ;;
esac
"""


@pytest.mark.parametrize("slices", [1, 2])
def test_tpu_slices_that_are_taken_away_are_asked_for_again(stand_in, tmp_path, slices):
    stand_in("gcloud", GCLOUD)
    words = ["--name", "it", "--zone", "z", "--type", "v5p-128", "--spot"]
    words += ["--slices", str(slices)] if slices > 1 else []
    found = run("tpu.sh", *words, "--", "--run", "/mnt/a b", "--steps", "5")
    assert found.returncode == 0, found.stderr
    made = [call for call in calls(tmp_path) if " create " in call]
    assert len(made) == 2 and len([call for call in calls(tmp_path) if " delete " in call]) == 1
    nodes = "--node-count 2 --node-prefix it" if slices > 1 else "--node-id it"
    assert all(nodes in call and "--spot" in call and "--runtime-version v2-alpha-tpuv5 " in call for call in made)
    trained = [call for call in calls(tmp_path) if "pretrain" in call]
    assert len(trained) == 2 * slices
    assert all(r"--run /mnt/a\ b --steps 5" in call and "--worker all" in call for call in trained)
    names = {call.split(" ssh ")[1].split()[0] for call in trained}
    assert names == ({"it-0", "it-1"} if slices > 1 else {"it"})


def test_a_wrong_command_is_not_started_again_on_tpu(stand_in, tmp_path):
    stand_in("gcloud", 'case "$*" in *describe*) echo ACTIVE ;; *pretrain*) exit 2 ;; esac')
    assert run("tpu.sh", "--name", "it", "--zone", "z", "--type", "v6e-8", "--", "--stepz", "5").returncode == 2
    assert len([call for call in calls(tmp_path) if "pretrain" in call]) == 1
    assert run("tpu.sh", "--name", "it", "--zone", "z", "--delete").returncode == 0
    assert calls(tmp_path)[-1].startswith("gcloud compute tpus queued-resources delete it --zone z")
    for words in ([], ["--name", "it"], ["--nam", "it"], ["--name", "it", "--zone", "z", "--type", "v6e-8"]):
        found = run("tpu.sh", *words)
        assert found.returncode == 2 and "tpu.sh --name NAME" in found.stderr


def test_what_fails_before_the_run_is_tried_again_on_tpu(stand_in, tmp_path):
    """Whatever its status: only pretrain's own 2 says that its command is wrong."""
    body = """case "$*" in
  *describe*) echo ACTIVE ;;
  *"pip install"*) [[ -e "$STATE/tried" ]] || { touch "$STATE/tried"; exit 2; } ;;
esac"""
    stand_in("gcloud", body)
    assert run("tpu.sh", "--name", "it", "--zone", "z", "--type", "v6e-8", "--", "--steps", "5").returncode == 0
    asked = calls(tmp_path)
    assert len([call for call in asked if "pip install" in call]) == 2
    assert len([call for call in asked if "pretrain" in call]) == 1


@pytest.mark.parametrize("is_there", [True, False])
def test_slices_that_were_not_found_for_once_are_not_given_up_on_tpu(stand_in, tmp_path, is_there):
    """They are there, and cannot be asked for again; if they are not, what cannot be made ends the launcher."""
    then = "echo ACTIVE" if is_there else "exit 1"
    body = f"""case "$*" in
  *describe*) [[ -e "$STATE/asked" ]] || {{ touch "$STATE/asked"; exit 1; }}; {then} ;;
  *" create "*) exit 1 ;;
esac"""
    stand_in("gcloud", body)
    found = run("tpu.sh", "--name", "it", "--zone", "z", "--type", "v6e-8", "--", "--steps", "5")
    assert found.returncode == (0 if is_there else 1)
    assert any("pretrain" in call for call in calls(tmp_path)) == is_there


def test_hosts_are_numbered_and_started_again_together(stand_in, tmp_path, monkeypatch):
    # The second host breaks at first; the others would run on, were they not ended.
    body = """
[[ -e "$STATE/again" ]] && exit 0
while (($(grep -c "python -m" "$CALLS") < 3)); do sleep 0.05; done
[[ "$1" == two ]] && { touch "$STATE/again"; exit 1; }
exec sleep 30
"""
    stand_in("fake-ssh", body)
    monkeypatch.setenv("SSH", "fake-ssh")
    found = run("hosts.sh", "one", "two", "three", "--", "--run", "a b")
    assert found.returncode == 0, found.stderr
    started = [call for call in calls(tmp_path) if "pretrain" in call]
    assert len(started) == 6 and "status 1; starting again" in found.stderr
    for i, host in enumerate(("one", "two", "three")):
        mine = [call for call in started if call.startswith(f"fake-ssh {host} ")]
        assert len(mine) == 2
        for call in mine:
            assert f"OPTJAX_COORDINATOR=one:8476 OPTJAX_NUM_PROCESSES=3 OPTJAX_PROCESS_ID={i} exec python" in call
            assert r"--run a\ b" in call


def slowly(script: str, tmp_path: Path, monkeypatch) -> None:
    """Has bash wait before each command of that script until it is told, and so be told before the next command."""
    (tmp_path / "slow").write_text(f"[[ $0 != *{script} ]] || trap '[[ -e $STATE/told ]] || sleep 0.3' DEBUG\n")
    monkeypatch.setenv("BASH_ENV", str(tmp_path / "slow"))


def tell_when_up(tmp_path: Path, ups: int, script: str, *words: str, status: int = 75) -> None:
    """Starts a launcher, tells it to stop once so many files `up…` are there, and sees with what it ends."""
    process = subprocess.Popen(["bash", str(LAUNCHERS / script), *words], start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("up*"))) < ups:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        (tmp_path / "told").touch()
        assert process.wait(timeout=30) == status
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("early", [False, True])
def test_hosts_that_are_told_to_stop_all_end(stand_in, tmp_path, monkeypatch, early):
    stand_in("fake-ssh", "trap 'exit 75' TERM; touch \"$STATE/up-$1\"; while true; do sleep 0.1; done")
    monkeypatch.setenv("SSH", "fake-ssh")
    if early:
        slowly("hosts.sh", tmp_path, monkeypatch)
    # At the first one's word, when slow, the second has not been started; it is then, and told as well.
    tell_when_up(tmp_path, 1 if early else 2, "hosts.sh", "one", "two", "--", "--run", "x")
    asked = sorted(call.split()[1] for call in calls(tmp_path))
    # The second may be told before it has written that it was asked.
    assert asked == ["one", "two"] or early and asked == ["one"]


def test_hosts_that_are_told_to_stop_between_two_runs_do_not_start_again(stand_in, tmp_path, monkeypatch):
    stand_in("fake-ssh", '(sleep 1; touch "$STATE/up") & exit 1')
    monkeypatch.setenv("SSH", "fake-ssh")
    monkeypatch.setenv("WAIT", "30")
    tell_when_up(tmp_path, 1, "hosts.sh", "one", "--", "--run", "x")
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize("words", [[], ["one"], ["--", "--run", "x"]])
def test_hosts_without_hosts_or_arguments(words):
    found = run("hosts.sh", *words)
    assert found.returncode == 2 and "hosts.sh HOST" in found.stderr


@pytest.mark.parametrize("early", [False, True])
def test_a_slurm_job_that_is_told_to_stop_saves_and_queues_itself_again(stand_in, tmp_path, monkeypatch, early):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    stand_in("scontrol")
    stand_in("scancel", "exit 1")  # then the step is told directly
    stand_in("srun", "trap 'sleep 0.3; exit 75' TERM; touch \"$STATE/up\"; while true; do sleep 0.1; done")
    if early:
        slowly("slurm.sh", tmp_path, monkeypatch)
    tell_when_up(tmp_path, 1, "slurm.sh", "--run", "x")
    assert calls(tmp_path)[-1] == "scontrol requeue 77"


def test_a_slurm_job_that_is_told_to_stop_queues_itself_again_whichever_process_ends_first(
    stand_in, tmp_path, monkeypatch
):
    """Once the first has ended with 75, srun ends the others, and then it ends by their signal itself."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    stand_in("scontrol")
    stand_in("scancel", "exit 1")
    stand_in("srun", "trap 'exit 143' TERM; touch \"$STATE/up\"; while true; do sleep 0.1; done")
    tell_when_up(tmp_path, 1, "slurm.sh", "--run", "x", status=143)
    assert calls(tmp_path)[-1] == "scontrol requeue 77"


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_a_slurm_job_that_ends_by_itself_is_over(stand_in, tmp_path, monkeypatch, status):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    stand_in("scontrol")
    stand_in("srun", f"exit {status}")
    assert run("slurm.sh", "--run", "x").returncode == status
    [only] = calls(tmp_path)
    assert only.startswith("srun --kill-on-bad-exit=1 python -m optjax.train.pretrain --run x")


def test_the_jobset_hangs_together():
    text = (LAUNCHERS / "gke.yaml").read_text()
    spec = yaml.safe_load(text)
    assert spec["kind"] == "JobSet" and spec["apiVersion"].startswith("jobset.x-k8s.io/")
    [job] = spec["spec"]["replicatedJobs"]
    inside = job["template"]["spec"]
    assert inside["parallelism"] == inside["completions"] and inside["backoffLimit"] == 0
    pod = inside["template"]["spec"]
    # 2x2x4 chips on hosts of four.
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert chips * inside["completions"] == int(sides[0]) * int(sides[1]) * int(sides[2])
    [rule] = inside["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"] and rule["onExitCodes"]["values"] == [2]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert json.loads(json.dumps(spec)) == spec
