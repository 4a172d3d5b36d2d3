"""The scripts of tpu/ against a gcloud that stub_gcloud.sh plays; what they send to workers really runs."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

TPU = Path(__file__).parents[2] / "tpu"
STUB_GCLOUD = Path(__file__).with_name("stub_gcloud.sh")
SCRIPTS = ["create", "setup", "run", "babysit", "status", "logs", "stop", "delete", "profile"]
TRAIN = ["python", "-m", "hybrid_jax.train", "--config", "configs/quickstart.yaml"]
COMMAND = [*TRAIN, "run_dir=gs://bucket/runs/first"]
ARGUMENTS = {"run": ["--", *COMMAND], "babysit": ["--", *COMMAND], "profile": ["gs://bucket/runs/a b/profile"]}


def words_of(call: list[str], flag: str) -> str:
    return next(word for word in call if word.startswith(f"{flag}=")).removeprefix(f"{flag}=")


# create


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5e-8", "v2-alpha-tpuv5-lite"),
    ],
)
def test_the_runtime_follows_the_accelerator(cloud, accelerator, runtime):
    cloud.write("states", "MISSING", "ACTIVE")
    cloud.ok("create", TPU_ACCELERATOR=accelerator)
    (call,) = cloud.calls("queued-resources create")
    assert words_of(call, "--runtime-version") == runtime
    assert words_of(call, "--accelerator-type") == accelerator.replace("v5e", "v5litepod")


def test_create_waits_through_the_queue_and_says_how_to_end_the_bill(cloud):
    cloud.write(
        "states",
        "MISSING",
        "ACCEPTED",
        "WAITING_FOR_RESOURCES",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    )
    said = cloud.ok("create")
    (call,) = cloud.calls("queued-resources create")
    assert " ".join(call) == (
        "compute tpus queued-resources create tiny --node-id=tiny --zone=us-west4-a --project=a-project --quiet"
        " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    assert re.findall(r"tiny: (\w+)", said) == ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert said.count("gcloud compute tpus queued-resources delete tiny --zone=us-west4-a") == 2
    assert len(cloud.calls("queued-resources describe")) == 6


@pytest.mark.parametrize(
    ("arguments", "track", "flags"),
    [
        (["--spot"], [], ["--spot"]),
        (["--on-demand"], [], []),
        (["--flex-start"], ["alpha"], ["--provisioning-model=flex-start", "--max-run-duration=7h"]),
    ],
)
def test_capacity_is_spot_on_demand_or_flex_start(cloud, arguments, track, flags):
    cloud.write("states", "MISSING", "ACTIVE")
    cloud.ok("create", *arguments, TPU_MAX_RUN="7h")
    (call,) = cloud.calls("queued-resources create")
    assert call[: len(track) + 2] == [*track, "compute", "tpus"]
    assert call[call.index("--runtime-version=v2-alpha-tpuv5-lite") + 1 :] == flags


def test_flags_of_the_env_file_reach_gcloud_with_their_spaces(cloud):
    cloud.write("env", "TPU_CREATE_FLAGS=(--network=mine '--labels=a=b c')", "TPU_VALID_UNTIL=6h")
    cloud.write("states", "MISSING", "ACTIVE")
    cloud.ok("create")
    (call,) = cloud.calls("queued-resources create")
    assert call[-3:] == ["--valid-until-duration=6h", "--network=mine", "--labels=a=b c"]


def test_a_request_that_fails_is_repeated(cloud):
    cloud.write("states", "MISSING", "ACTIVE")
    cloud.write("fail_queued-resources-create", 2)
    cloud.ok("create")
    assert len(cloud.calls("queued-resources create")) == 3


def test_requests_are_not_repeated_for_ever(cloud):
    cloud.write("states", "MISSING")
    cloud.write("fail_queued-resources-create", 99)
    done = cloud.run("create")
    assert done.returncode == 1
    assert "not accepted in 3 attempts" in done.stderr
    assert len(cloud.calls("queued-resources create")) == 3


def test_a_request_that_google_refuses_is_not_repeated(cloud):
    cloud.write("states", "MISSING")
    cloud.write("fail_queued-resources-create", 99)
    cloud.write("fail_text", "ERROR: (gcloud) PERMISSION_DENIED: no quota")
    done = cloud.run("create")
    assert done.returncode == 2
    assert "PERMISSION_DENIED: no quota" in done.stderr
    assert len(cloud.calls("queued-resources create")) == 1


def test_a_request_that_fails_in_the_queue_is_reported(cloud):
    cloud.write("states", "MISSING", "PROVISIONING", "FAILED")
    done = cloud.run("create")
    assert done.returncode == 1
    assert "error: tiny is FAILED" in done.stderr


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_failed_or_suspended_request_is_deleted_before_the_next(cloud, state):
    cloud.write("states", state, "ACTIVE")
    cloud.ok("create")
    verbs = [call[3] for call in cloud.calls("queued-resources")]
    assert verbs == ["describe", "delete", "create", "describe"]


def test_a_preempted_node_is_replaced_although_its_request_is_active(cloud):
    cloud.write("node_states", "PREEMPTED", "READY")
    cloud.ok("create")
    assert [call[3] for call in cloud.calls("queued-resources")] == ["describe", "delete", "create", "describe"]


def test_a_tpu_that_is_there_is_not_requested_again(cloud):
    cloud.ok("create")
    assert not cloud.calls("create")


def test_a_question_that_fails_is_asked_again_and_not_taken_for_a_missing_tpu(cloud):
    cloud.write("states", "BROKEN", "BROKEN", "ACTIVE")
    cloud.ok("create")
    assert not cloud.calls("queued-resources create")
    cloud.write("states", "BROKEN")
    done = cloud.run("create")
    assert done.returncode == 1
    assert not cloud.calls("queued-resources create")


# setup and run


def test_setup_installs_on_every_worker_and_asks_jax_for_the_devices(cloud):
    cloud.write("env", "TPU_PACKAGES=('jax[tpu]==0.11.0' wandb)")
    cloud.write("fail_tpu-vm-ssh", 2)  # keys on their way
    cloud.ok("setup")
    first = cloud.calls("tpu-vm ssh")[0]
    assert (words_of(first, "--worker"), words_of(first, "--command")) == ("0", "true")
    for worker in (0, 1):
        uv = cloud.read(worker, "uv")
        assert uv[:3] == ["venv", "--python", "3.12"]
        assert uv[-5:] == ["-e", ".[tpu]", "etils[epath-gcs]", "jax[tpu]==0.11.0", "wandb"]
        flag, program = cloud.read(worker, "arguments")
        assert flag == "-c"
        assert "jax.distributed.initialize(" in program
        assert "jax.device_count()" in program
        assert (cloud.home(worker) / "hybrid_jax" / "pyproject.toml").is_file()


NASTY = [
    "run_dir=gs://b/a b",
    "it's",
    'say "hi"',
    "$HOME `id` $(id)",
    "back\\slash",
    "",
    "*",
    "a\nb",
    "&& false",
    "ö",
]


def test_every_worker_gets_the_same_words_with_spaces_and_quotes_intact(cloud):
    cloud.set_up()
    secret = "a 'secret' $PATH"
    cloud.ok(
        *["run", "--sync", "none", "--env", "XLA_FLAGS=--a=1 --b='2'", "--", *COMMAND, *NASTY],
        TPU_EXPORTS="HF_TOKEN NOT_SET",
        HF_TOKEN=secret,
    )
    cloud.wait_for("exit 0")
    for worker in (0, 1):
        assert cloud.read(worker, "arguments") == [*COMMAND[1:], *NASTY]
        environment = cloud.read(worker, "environment")
        assert f"HF_TOKEN={secret}" in environment
        assert "XLA_FLAGS=--a=1 --b='2'" in environment
        assert cloud.read(worker, "folder") == [f"{cloud.home(worker)}/hybrid_jax\n"]
        job = cloud.home(worker) / "hybrid_jax_job"
        assert (job / "command.sh").stat().st_mode & 0o077 == 0
        assert job.stat().st_mode & 0o077 == 0
    assert not any("secret" in word for call in cloud.calls() for word in call), (
        "a secret stands in a command line"
    )
    starts = [call for call in cloud.calls("tpu-vm ssh") if words_of(call, "--command").endswith("start")]
    assert [words_of(call, "--worker") for call in starts] == ["all"]


def test_the_checkout_travels_with_changes_and_without_what_git_ignores(cloud):
    checkout = cloud.folder / "checkout"
    shutil.copytree(TPU, checkout / "tpu", ignore=shutil.ignore_patterns("env"))
    (checkout / ".gitignore").write_text("/runs/\n")
    (checkout / "old name").write_text("committed")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [str(checkout / "tpu" / "run.sh"), *arguments, "--", "python", "-V"]
        done = subprocess.run(line, env=cloud.environment, capture_output=True, text=True)
        return done

    cloud.set_up()
    (checkout / "old name").rename(checkout / "new name")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "big").write_text("ignored")
    assert run().returncode == 0
    cloud.wait_for("exit 0")
    there = cloud.home(1) / "hybrid_jax"
    assert (there / "new name").read_text() == "committed"
    assert not (there / "old name").exists()
    assert not (there / "runs").exists()

    (there / "runs").mkdir()
    (there / "runs" / "mine").write_text("written by a run")
    assert run("--sync", "HEAD").returncode == 0
    cloud.wait_for("exit 0")
    assert (there / "old name").read_text() == "committed"
    assert not (there / "new name").exists(), "a file of the last archive is left"
    assert (there / "runs" / "mine").read_text() == "written by a run"

    done = run("--sync", "no-such-ref")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --sync must be checkout, none or a git ref, got 'no-such-ref'\n",
    )


def test_a_second_run_is_refused_while_one_goes_on_and_stop_lets_it_save(cloud):
    cloud.set_up()
    cloud.behave("wait")
    cloud.ok("run", "--sync", "none", "--", *COMMAND)
    cloud.wait_for("running")
    done = cloud.run("run", "--sync", "none", "--", *COMMAND)
    assert done.returncode == 1
    assert "stop it with tpu/stop.sh" in done.stderr
    assert len(cloud.calls("tpu-vm scp")) == 1, "files were changed under a run"
    cloud.ok("stop")
    cloud.wait_for("stopped")
    for worker in ("0", "1"):
        log = cloud.ok("logs", "--worker", worker)
        assert "saved\n" in log
        assert log.count("starts on") == 1
    assert cloud.read(0, "hybrid_jax_job/exit_code") == ["143\n"]
    cloud.behave("exit 0")
    cloud.ok("run", "--sync", "none", "--", *COMMAND)
    cloud.wait_for("exit 0")


def test_stop_kills_only_when_told_to(cloud):
    cloud.set_up()
    cloud.behave("deaf")
    cloud.ok("run", "--sync", "none", "--", *COMMAND)
    cloud.wait_for("running")
    for _ in range(100):
        if "deaf" in cloud.ok("logs", "--worker", "1"):
            break
    done = cloud.run("stop", TPU_STOP_SECONDS="0")
    assert done.returncode == 1
    assert "--force kills it" in done.stderr
    cloud.wait_for("running")
    cloud.ok("stop", "--force", TPU_STOP_SECONDS="0")
    cloud.wait_for("stopped")
    assert not (cloud.home(0) / "hybrid_jax_job" / "exit_code").exists(), "it ended by itself"


# babysit


def babysit(cloud, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return cloud.run("babysit", *arguments, "--", *COMMAND, "it's me", **environment)


def verbs(cloud) -> list[str]:
    return [call[3] for call in cloud.calls("queued-resources") if call[3] != "describe"]


@pytest.mark.parametrize("lost", [("PREEMPTED", "READY"), ("READY", "SUSPENDED")])
def test_babysit_replaces_a_preempted_tpu_and_runs_the_same_command_to_its_end(cloud, lost):
    node, request = lost
    if request == "SUSPENDED":
        cloud.write("states", "MISSING", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "PROVISIONING", "ACTIVE")
    else:
        cloud.write("states", "MISSING", "ACTIVE")
        cloud.write("node_states", "READY", "READY", node, node, "READY")
    cloud.behave("wait", "exit 0")
    done = babysit(cloud)
    assert done.returncode == 0, done.stderr
    assert verbs(cloud) == ["create", "delete", "create"]
    for worker in (0, 1):
        assert cloud.read(worker, "arguments") == [*COMMAND[1:], "it's me"]
    assert "the run has finished" in done.stderr
    assert "restart 1 of 10" in done.stderr


def test_babysit_can_end_the_bill_itself(cloud):
    cloud.write("states", "MISSING", "ACTIVE")
    assert babysit(cloud, "--delete-when-done").returncode == 0
    assert verbs(cloud) == ["create", "delete"]


@pytest.mark.slow
def test_babysit_gives_up_after_so_many_restarts(cloud):
    cloud.write("states", "MISSING", "ACTIVE", "ACTIVE", "SUSPENDED")
    cloud.behave("wait")
    done = babysit(cloud, TPU_MAX_RESTARTS="2")
    assert done.returncode == 1
    assert "gave up after 2 restarts" in done.stderr
    assert "queued-resources delete tiny" in done.stderr.splitlines()[-1]
    assert done.stderr.count("; restart ") == 2


@pytest.mark.slow
def test_time_that_a_run_was_up_forgives_earlier_restarts(cloud):
    cloud.write("states", "MISSING", *["ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED"] * 3, "ACTIVE")
    cloud.behave("wait", "wait", "wait", "exit 0")
    done = babysit(cloud, TPU_MAX_RESTARTS="1", TPU_HEALTHY_SECONDS="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("restart 1 of 1") == 3


def test_babysit_stops_at_a_mistake_in_the_config(cloud):
    cloud.behave("exit 2")
    done = babysit(cloud)
    assert done.returncode == 2
    assert "mistake in its config" in done.stderr
    assert not verbs(cloud)


def test_babysit_does_not_repeat_a_mistake_in_its_settings(cloud):
    cloud.write("states", "MISSING")
    done = babysit(cloud, TPU_CAPACITY="cheap")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_babysit_restarts_a_run_that_crashed_on_one_worker_everywhere(cloud):
    cloud.behave("exit 1", "exit 0", worker=0)
    cloud.behave("wait", "exit 0", worker=1)
    done = babysit(cloud)
    assert done.returncode == 0, done.stderr
    assert not verbs(cloud), "the TPU itself was well"
    assert "saved" in cloud.ok("logs", "--worker", "1")
    assert cloud.ok("logs", "--worker", "1").count("starts on") == 2


def test_babysit_ends_when_the_run_is_stopped_or_the_tpu_deleted_by_hand(cloud):
    cloud.set_up()
    cloud.behave("wait")
    cloud.ok("run", "--sync", "none", "--", *COMMAND)
    cloud.wait_for("running")
    line = [str(TPU / "babysit.sh"), "--", *COMMAND]
    with subprocess.Popen(line, env=cloud.environment, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stderr is not None
        assert "watching it" in "".join(watcher.stderr.readline() for _ in range(3))
        cloud.ok("stop")
        said = watcher.stderr.read()
    assert watcher.returncode == 143, said

    cloud.write("states", "ACTIVE", "ACTIVE", "MISSING")
    done = babysit(cloud)
    assert done.returncode == 1
    assert "deleted by somebody" in done.stderr
    assert not verbs(cloud)


# the rest


def test_delete_ends_the_bill_and_is_content_when_nothing_is_there(cloud):
    cloud.ok("delete")
    (call,) = cloud.calls("queued-resources delete")
    assert call[4:] == ["tiny", "--zone=us-west4-a", "--project=a-project", "--quiet", "--force"]
    cloud.write("states", "MISSING")
    assert "there is no tiny" in cloud.ok("delete")
    assert len(cloud.calls("queued-resources delete")) == 1


def test_profile_tunnels_to_a_server_on_the_worker(cloud):
    cloud.program("uvx", '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$HOME/uvx"\n')
    (cloud.home(1) / "hybrid_jax_job").mkdir()
    shutil.copy(TPU / "worker.sh", cloud.home(1) / "hybrid_jax_job")
    cloud.ok("profile", "--worker", "1", "--port", "7000", "gs://b/a run/profile")
    (call,) = cloud.calls("tpu-vm ssh")
    assert "--ssh-flag=-L7000:localhost:7000" in call
    assert cloud.read(1, "uvx")[-3:] == ["xprof", "--port=7000", "--logdir=gs://b/a run/profile"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_every_command_and_calls_none(cloud, script):
    arguments = ["--dry-run", *ARGUMENTS.get(script, [])]
    printed = cloud.ok(script, *arguments, TPU_EXPORTS="HF_TOKEN", HF_TOKEN="a-secret")
    assert not cloud.calls()
    lines = [shlex.split(line) for line in printed.splitlines() if line.startswith("gcloud ")]
    assert lines, printed
    assert "a-secret" not in printed
    for line in lines:
        assert {"tiny", "--zone=us-west4-a", "--project=a-project"} <= {word for word in line} | {
            word.split(":")[0] for word in line
        }
    assert not list(Path(cloud.environment["HOME"]).glob("hybrid_jax*"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_needs_no_gcloud_and_a_real_one_says_that_it_is_missing(cloud, script):
    bare = cloud.folder / "bare"
    bare.mkdir()
    for name in [
        "bash",
        "dirname",
        "basename",
        "sed",
        "sleep",
        "date",
        "grep",
        "sort",
        "cat",
        "mktemp",
        "tr",
        "git",
        "rm",
    ]:
        (bare / name).symlink_to(shutil.which(name) or name)
    cloud.ok(script, "--dry-run", *ARGUMENTS.get(script, []), PATH=str(bare))
    done = cloud.run(script, *ARGUMENTS.get(script, []), PATH=str(bare))
    assert done.returncode == 2
    assert done.stderr == "error: gcloud is not installed; see https://cloud.google.com/sdk/docs/install\n"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("missing", ["TPU_PROJECT", "TPU_ZONE", "TPU_NAME"])
def test_a_missing_variable_is_one_line_and_exit_code_2(cloud, script, missing):
    done = cloud.run(script, *ARGUMENTS.get(script, []), **{missing: ""})
    assert done.returncode == 2
    assert done.stderr == f"error: {missing} is not set; cp tpu/env.example tpu/env and fill it in\n"
    assert not cloud.calls()


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("create", [], {"TPU_ACCELERATOR": ""}, "TPU_ACCELERATOR is not set"),
        ("create", [], {"TPU_ACCELERATOR": "v5e:4x4"}, "TPU_ACCELERATOR must be like v5litepod-16"),
        ("create", [], {"TPU_ACCELERATOR": "v5litpod-16"}, "TPU_ACCELERATOR must be like v5litepod-16"),
        (
            "create",
            [],
            {"TPU_ACCELERATOR": "v6e-12"},
            "TPU_ACCELERATOR: v6e has 1, 4, 8, 16, 32, 64, 128 or 256",
        ),
        ("create", [], {"TPU_ACCELERATOR": "v4-4"}, "TPU_ACCELERATOR: v4 is counted in cores, 8 or a multiple"),
        ("create", [], {"TPU_ACCELERATOR": "v5p"}, "TPU_ACCELERATOR: v5p is counted in cores"),
        *(
            ("babysit", [*dry, "--", *COMMAND], {"TPU_ACCELERATOR": name}, "TPU_ACCELERATOR must be like")
            for dry in ([], ["--dry-run"])
            for name in ("v7e-8", "v5ee-16", "a100")
        ),
        ("create", [], {"TPU_ACCELERATOR": "tpu7x-8"}, "tpu7x is rented through GKE only"),
        (
            "babysit",
            ["--dry-run", "--", *TRAIN],
            {},
            "run_dir is 'runs/quickstart', on a disk that is lost with",
        ),
        ("babysit", ["--", *TRAIN, "run_dir=runs/mine"], {}, "run_dir is 'runs/mine', on a disk that is lost"),
        (
            "create",
            [],
            {"TPU_CAPACITY": "cheap"},
            "TPU_CAPACITY must be spot, on-demand or flex-start, got 'cheap'",
        ),
        ("create", ["now"], {}, "unknown argument 'now'; see create.sh --help"),
        ("status", [], {"TPU_NAME": "My TPU"}, "TPU_NAME must be lower-case letters, digits and dashes"),
        ("status", [], {"TPU_RETRIES": "few"}, "TPU_RETRIES must be a whole number, got 'few'"),
        ("status", [], {"TPU_ENV": "/nowhere/env"}, "TPU_ENV names no file: /nowhere/env"),
        ("run", [], {}, "run.sh needs a command"),
        ("run", ["--env", "A B=1", "--", "true"], {}, "'A B' is not a variable's name"),
        ("run", ["--env", "A", "--", "true"], {}, "--env must be NAME=VALUE, got 'A'"),
        (
            "run",
            ["--", "true"],
            {"TPU_EXPORTS": "a[$(touch>oops)]"},
            "'a[$(touch>oops)]' is not a variable's name",
        ),
        ("run", ["--sync"], {}, "--sync needs a value"),
        ("babysit", [], {}, "babysit.sh needs a command"),
        ("logs", ["--worker", "0; id"], {}, "--worker must be a number or all"),
        ("logs", ["--lines", "x"], {}, "lines must be a whole number, got 'x'"),
        ("profile", [], {}, "profile.sh needs the folder of the profiles"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cloud, script, arguments, environment, message):
    done = cloud.run(script, *arguments, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not cloud.calls()
    assert not (cloud.folder / "oops").exists()


def test_help_is_the_head_of_the_script(cloud):
    for script in SCRIPTS:
        assert cloud.ok(script, "--help").startswith(f"tpu/{script}.sh ")


# what holds for all files


def shell_files() -> list[Path]:
    return [*sorted(TPU.glob("*.sh")), *sorted(TPU.glob("slurm/*")), TPU / "env.example", STUB_GCLOUD]


def test_every_script_is_strict_and_evaluates_nothing():
    for path in shell_files():
        text = path.read_text()
        if text.startswith("#!") and path != STUB_GCLOUD:
            assert "\nset -euo pipefail\n" in text, path
        assert not re.search(r"\beval\b", text), path
    for script in SCRIPTS:
        assert os.access(TPU / f"{script}.sh", os.X_OK), script


def test_shellcheck_has_nothing_to_say():
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck")
    done = subprocess.run([program, "-x", *map(str, shell_files())], capture_output=True, text=True, cwd=TPU)
    assert done.returncode == 0, done.stdout


def test_the_example_settings_hold_no_project_and_let_the_shell_win(cloud):
    done = cloud.run("status", TPU_PROJECT="", TPU_ENV=str(TPU / "env.example"))
    assert done.stderr.startswith("error: TPU_PROJECT is not set")
    printed = cloud.ok("create", "--dry-run", TPU_ENV=str(TPU / "env.example"), TPU_ACCELERATOR="v6e-8")
    assert "--accelerator-type=v6e-8" in printed
    assert "--project=a-project" in printed


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (143, True)])
def test_the_slurm_job_goes_back_to_the_queue_only_after_it_has_saved(cloud, code, requeued):
    cloud.program("srun", f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >srun_arguments\nexit {code}\n')
    cloud.program("scontrol", '#!/usr/bin/env bash\necho "$@" >scontrol_arguments\n')
    environment = {**cloud.environment, "SLURM_SUBMIT_DIR": str(cloud.folder), "SLURM_JOB_ID": "77"}
    line = ["bash", str(TPU / "slurm" / "train.sbatch"), "--config", "a file.yaml", "run_dir=it's here"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    words = (cloud.folder / "srun_arguments").read_text().rstrip("\0").split("\0")
    assert words[1:] == ["python", "-m", "hybrid_jax.train", *line[2:]]
    asked = cloud.folder / "scontrol_arguments"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77\n" if requeued else "")


def test_the_slurm_job_has_a_process_for_every_gpu():
    text = (TPU / "slurm" / "train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@300"
    assert options["open-mode"] == "append"


def test_the_jobset_has_a_pod_for_every_four_chips_and_fails_for_good_at_a_mistake_in_the_config():
    (jobset,) = yaml.safe_load_all((TPU / "gke" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert chips == container["resources"]["requests"]["google.com/tpu"]
    assert job["parallelism"] * chips == job["completions"] * chips == rows * columns
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy needs it"
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert container["command"][:3] == COMMAND[:3]
    config = container["command"][container["command"].index("--config") + 1]
    assert (TPU.parent / config).is_file()


def test_the_image_copies_only_what_is_there():
    text = (TPU / "gke" / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((TPU.parent / source).exists() for source in sources.split()), sources


def test_every_file_that_the_guide_names_exists():
    guide = (TPU / "README.md").read_text()
    named = set(re.findall(r"\b((?:tpu|configs|scripts)/[\w./-]*\.(?:sh|sbatch|yaml|example|md))", guide))
    assert {f"tpu/{script}.sh" for script in SCRIPTS} <= named
    assert not [name for name in named if not (TPU.parent / name).is_file()]
