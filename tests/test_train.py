"""Training as a user runs it: the same on one process or two, the same after kill -9, one line on bad input."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from bare_machine import COMPILER
from conftest import REPOSITORY, Experiment, stage_main, tiny_params
from forks import Fork
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.run import main as torchrun

from fairway.codec.byte_codecs import Lrzip
from fairway.model.gpt import GPT, param_groups
from fairway.model.init import initialize
from fairway.params import Params, load_params
from fairway.preflight import check_training
from fairway.runtime.distributed import Reading, World, alone
from fairway.runtime.errors import UserError, stage_arguments
from fairway.runtime.files import load_tensors
from fairway.runtime.progress import Figures
from fairway.runtime.resume import ResumePoints, only_run
from fairway.tokens.loader import Prefetcher
from fairway.tokens.shards import shard_paths
from fairway.tokens.validation import load_validation
from fairway.training import loop
from fairway.training.loop import Trained, train
from fairway.training.optimizer import Optimizer
from fairway.training.run import Run
from fairway.training.schedule import Clock, Moment, forecast
from fairway.training.step import Underway, launch, settle
from fairway.training.training_files import check_world, fingerprint, memory_named, train_stream

SEED = "1337"
ALONE = alone(torch.device("cpu"))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Subprocesses, too, keep to one thread: OpenMP threads that share a core with another process spin it away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def ready(tmp_path: Path, tokenized: Experiment) -> Experiment:
    """An experiment whose tokens are made."""
    return _with_tokens(tmp_path, tokenized)


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory: pytest.TempPathFactory, tokenized: Experiment) -> Experiment:
    """An experiment trained by one process (shared: do not change it)."""
    made = _with_tokens(tmp_path_factory.mktemp("trained"), tokenized)
    made.stage("train", SEED)
    return made


def _with_tokens(folder: Path, tokenized: Experiment) -> Experiment:
    made = Experiment(folder)
    shutil.copytree(tokenized.folder / "artifacts", made.folder / "artifacts")
    return made


def change(experiment: Experiment, **train: Any) -> Params:
    """Change keys of the train section (sections by one level of merging)."""
    params = experiment.params
    for key, value in train.items():
        params["train"][key] = (params["train"].get(key) or {}) | value if isinstance(value, dict) else value
    experiment.set_params(params)
    return load_params(experiment.folder / "params.yaml")


def run_loop(
    experiment: Experiment, params: Params, points: ResumePoints | None = None, world: World = ALONE
) -> tuple[Trained, list[Figures]]:
    """The public function on the experiment's tokens, in this process: what it returns, and every step's figures."""
    tokens = experiment.folder / "artifacts/tokens"
    model = GPT(params.model)
    model.init_weights(1337)
    validation = load_validation(tokens, seq_len=params.model.seq_len, vocab_size=params.model.vocab_size)
    ticks: list[Figures] = []
    with Prefetcher(train_stream(params.model, params.train, tokens, world), world.device) as loader:
        trained = train(
            model,
            loader,
            validation,
            params.train,
            world,
            log=lambda step, figures: None,
            tick=lambda step, figures: ticks.append(figures),
            points=points,
        )
    return trained, ticks


def curve(experiment: Experiment, figure: str) -> list[tuple[int, float]]:
    """(step, value) rows of one figure's dvclive file."""
    path = experiment.folder / f"artifacts/train/{SEED}/live/plots/metrics/{figure}.tsv"
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row[figure])) for row in csv.DictReader(file, delimiter="\t")]


def final_weights(experiment: Experiment) -> dict[str, Tensor]:
    """Every kind of weights that a run left, by "<kind>/<name>"."""
    folder = experiment.folder / f"artifacts/train/{SEED}"
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in files for name, value in load_tensors(file, "").items()}


@pytest.mark.parametrize("clip", ["micro_batch", "step"])
def test_one_process_and_two_train_alike(ready: Experiment, clip: str) -> None:
    alone, ticks = run_loop(ready, change(ready, clip=clip))
    ready.stage_of_processes(2, "train", SEED)
    shared = curve(ready, "train_loss")[:10]
    assert [step for step, _ in shared] == list(range(1, 11))
    np.testing.assert_allclose(
        [loss for _, loss in shared], [figures["train_loss"] for figures in ticks[:10]], atol=1e-4
    )
    for name in ["micro_grad_norm", *(["grad_norm"] if clip == "step" else [])]:
        assert curve(ready, name)[0] == (1, pytest.approx(ticks[0][name], rel=1e-4))
    for name, value in final_weights(ready).items():
        kind, _, parameter = name.partition("/")
        torch.testing.assert_close(value, alone.weights[kind][parameter], atol=2e-3, rtol=0)


def other_weights_by_rank(model: GPT, seed: int) -> None:
    """Weights of a seed that grows with the rank: more than what two kinds of CPU draw differently from one seed."""
    initialize(model, model.config, seed + int(os.environ["RANK"]))


def test_all_processes_begin_with_the_weights_of_the_first(ready: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.stage_of_processes(2, "train", SEED)
    alike = final_weights(ready)
    monkeypatch.setattr(GPT, "init_weights", other_weights_by_rank)
    ready.stage_of_processes(2, "train", SEED)
    for name, value in final_weights(ready).items():
        assert torch.equal(value, alike[name]), name


def test_a_run_leaves_what_later_stages_read(trained_alone: Experiment) -> None:
    folder = trained_alone.folder / f"artifacts/train/{SEED}"
    kinds = {"last", "ema_0.95", "swa"}
    assert {file.name for file in folder.iterdir()} == {*(f"{k}.safetensors" for k in kinds), "train.json", "live"}
    report = json.loads((folder / "train.json").read_text())
    assert (report["steps"], report["stopped_by"], report["train_tokens"]) == (12, "steps", 12 * 512)
    assert (report["environment"]["processes"], report["environment"]["attention"]) == (1, "plain")
    assert set(report["val_bpb_by_weights"]) == kinds
    steps, bpb = zip(*curve(trained_alone, "val_bpb"), strict=True)
    assert steps == (0, 6, 12)
    assert bpb[-1] == report["val_bpb"] < bpb[0]
    assert list((trained_alone.folder / "artifacts/resume").glob("train-*/*")) == []


def _wait_for_a_resume_point(experiment: Experiment, is_running: Callable[[], bool]) -> None:
    """Return once a training that was started has written its first resume point."""
    latest = experiment.folder / f"artifacts/resume/train-{SEED}/latest.json"
    give_up_at = time.monotonic() + 60
    while not latest.exists():
        assert is_running()
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(ready: Experiment) -> None:
    change(ready, max_steps=30, checkpoint_every=5)
    training = Fork(stage_main("train", SEED), ready.folder)
    _wait_for_a_resume_point(ready, training.is_running)
    training.kill()
    assert not (ready.folder / f"artifacts/train/{SEED}").exists()
    ready.stage("train", SEED)
    resumed, losses = final_weights(ready), curve(ready, "train_loss")
    ready.stage("train", SEED)
    assert losses == curve(ready, "train_loss")
    straight = final_weights(ready)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc and PR_SET_PDEATHSIG")
def test_workers_die_with_their_launcher_and_one_process_goes_on(ready: Experiment) -> None:
    """The workers are processes of their own, as torchrun starts them."""
    change(ready, max_steps=30, checkpoint_every=5)
    ready.copy_code()
    command = ["--standalone", "--nproc-per-node=2", "-m", "stages.train", SEED]
    launcher = Fork(lambda: torchrun(command), ready.folder)
    _wait_for_a_resume_point(ready, launcher.is_running)
    workers = _children(launcher.pid)
    assert len(workers) == 2
    launcher.kill()
    give_up_at = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z (" not in _state(pid) for pid in workers):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    assert not (ready.folder / f"artifacts/train/{SEED}").exists()
    ready.stage("train", SEED)
    steps = [step for step, _ in curve(ready, "train_loss")]
    assert steps == [*range(1, 11), *range(12, 31, 2)]


def _state(pid: int) -> str:
    try:
        return next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except OSError:
        return "Z (gone)"


def test_a_second_run_of_the_same_seed_is_refused(tmp_path: Path) -> None:
    with only_run(tmp_path / "train-1"):
        with (
            pytest.raises(UserError, match=r"train-1\.lock: held by another training of this seed"),
            only_run(tmp_path / "train-1", patience_s=0),
        ):
            pass
        with only_run(tmp_path / "train-2", patience_s=0):
            pass
    with only_run(tmp_path / "train-1", patience_s=0):
        pass


def test_a_changed_experiment_does_not_see_the_resume_point(ready: Experiment) -> None:
    tokens = ready.folder / "artifacts/tokens"
    params = load_params(ready.folder / "params.yaml")
    same = fingerprint(params.model, params.train, 1, tokens)
    ResumePoints(ready.folder / "resume", same).save(3, {"model/w": torch.ones(2)}, {"step": 3})
    assert ResumePoints(ready.folder / "resume", same).load() is not None
    changed = change(ready, grad_clip=0.5)
    others = [
        fingerprint(params.model, params.train, 2, tokens),
        fingerprint(changed.model, changed.train, 1, tokens),
    ]
    (tokens / "meta.json").write_text("{}")
    others.append(fingerprint(params.model, params.train, 1, tokens))
    assert len({same, *others}) == 4
    assert all(ResumePoints(ready.folder / "resume", other).load() is None for other in others)


def test_changed_code_does_not_see_the_resume_point(ready: Experiment) -> None:
    code = (
        "from pathlib import Path; from fairway.params import load_params;"
        "from fairway.training.training_files import fingerprint;"
        "p = load_params('params.yaml'); print(fingerprint(p.model, p.train, 1, Path('artifacts/tokens')))"
    )
    shown = ("fairway/runtime/progress.py", "stages/doctor.py")
    sources = (*shown, "fairway/reporting/page.py", "fairway/model/attention.py", "fairway/training/loop.py")
    before, *displays, report, model, train = ready.printed_as_sources_change(code, *sources)
    assert set(displays) == {before}
    assert len({before, model, train}) == 3
    ResumePoints(ready.folder / "resume", before).save(3, {"model/w": torch.ones(2)}, {"step": 3})
    assert ResumePoints(ready.folder / "resume", report).load() is not None
    assert ResumePoints(ready.folder / "resume", model).load() is None
    assert ResumePoints(ready.folder / "resume", train).load() is None


def test_the_same_seed_gives_the_same_weights_again(ready: Experiment) -> None:
    params = load_params(ready.folder / "params.yaml")
    one, other = (run_loop(ready, params)[0].weights["last"] for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("clip", ["micro_batch", "step"])
def test_training_learns_and_keeps_its_promises(ready: Experiment, clip: str) -> None:
    params = change(ready, clip=clip, max_steps=20)
    trained, ticks = run_loop(ready, params)
    assert (trained.steps, trained.stopped_by, len(ticks)) == (20, "steps", 20)
    assert ticks[0]["train_loss"] == pytest.approx(np.log(320), abs=0.05)
    assert trained.train_loss < 0.8 * ticks[0]["train_loss"]
    assert ticks[0]["lr_scale"] == 1.0
    assert all(figures["step_ms"] == 1000 * figures["clock_s"] / step > 1 for step, figures in enumerate(ticks, 1))
    assert ticks[-1]["lr_scale"] == pytest.approx(1 / 20 / params.train.schedule.warmdown)


def test_the_clock_stops_training_and_decays_the_learning_rate(ready: Experiment) -> None:
    params = change(ready, max_steps=100_000, max_wallclock_s=3.0, reserve_s=1.5)
    trained, ticks = run_loop(ready, params)
    assert trained.stopped_by == "wallclock"
    assert 1.5 <= trained.clock_s < 3.0
    assert ticks[-1]["lr_scale"] < 0.2


def test_the_gradient_norm_is_that_of_the_mean_over_the_micro_batches(ready: Experiment) -> None:
    """Shown on gradients made up here: the norm of their mean is not the mean of their norms."""
    params = change(ready, clip="step")
    model, generator = GPT(params.model), torch.Generator().manual_seed(1)
    optimizer = Optimizer(param_groups(model, side_matrices=False), params.train, ALONE)
    optimizer.gradients.clear()
    sums = [torch.zeros_like(p) for p in model.parameters()]
    norms = []
    for _ in range(2):
        made_up = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        norms.append(float(torch.cat([g.flatten() for g in made_up]).norm()))
        for p, total, g in zip(model.parameters(), sums, made_up, strict=True):
            p.grad = g
            total += g
        optimizer.add_gradients()
    found = optimizer.step(lr_scale=1.0, momentum=0.9)
    expected = float(torch.cat([total.flatten() for total in sums]).norm()) / 2
    assert found is not None
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(optimizer.gradients.norm) == pytest.approx(sum(norms) / 2, rel=1e-5)


def test_training_logs_the_norm_of_the_step_beside_that_of_its_micro_batches(ready: Experiment) -> None:
    """What differs between micro-batches cancels in the step's mean; a step of a single one has but one norm."""
    of_two = run_loop(ready, change(ready, clip="step", max_steps=1))[1][0]
    assert of_two["micro_grad_norm"] > 1.01 * of_two["grad_norm"]
    of_one = run_loop(ready, change(ready, clip="step", max_steps=1, micro_batch_tokens=512))[1][0]
    assert of_one["micro_grad_norm"] == pytest.approx(of_one["grad_norm"], rel=1e-6)


def test_a_step_that_clips_micro_batches_does_not_claim_to_know_its_own_norm(ready: Experiment) -> None:
    figures = run_loop(ready, change(ready, clip="micro_batch", max_steps=1))[1][0]
    assert "grad_norm" not in figures
    assert figures["micro_grad_norm"] > 0


class LateReading(Reading):
    """Figures of a device that is always behind: the host waits a while for the end of every step."""

    def arrived(self) -> bool:
        return False

    def read(self) -> list[list[float]]:
        time.sleep(0.3)
        return super().read()


class LateWorld(World):
    """A process with such a device."""

    def gather(self, values: Tensor) -> Reading:
        return LateReading(values[None])


def test_the_time_of_training_includes_the_wait_for_the_last_step(ready: Experiment) -> None:
    world = LateWorld(rank=0, size=1, device=torch.device("cpu"))
    trained, ticks = run_loop(ready, change(ready, max_steps=2), world=world)
    assert trained.clock_s >= ticks[-1]["clock_s"] >= ticks[0]["clock_s"] + 0.3 >= 0.6


def test_a_step_is_given_to_the_device_before_the_figures_of_the_last_one_are_known(
    ready: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def given(run: Run, clock: Clock, before: Underway | None) -> Underway:
        order.append(f"give {run.step + 1}")
        return launch(run, clock, before)

    def taken(run: Run, clock: Clock, underway: Underway) -> Figures:
        order.append(f"take {underway.step}")
        return settle(run, clock, underway)

    monkeypatch.setattr(loop, "launch", given)
    monkeypatch.setattr(loop, "settle", taken)
    ticks = run_loop(ready, change(ready, max_steps=3))[1]
    assert order == ["give 1", "give 2", "take 1", "give 3", "take 2", "take 3"]
    assert len(ticks) == 3


def test_where_a_run_will_stand_follows_from_the_steps_that_are_known_to_be_done() -> None:
    assert forecast(Moment(0, 0.2), 2) == Moment(2, 0.2), "nothing is known of how long a step takes"
    assert forecast(Moment(4, 2.0), 6) == Moment(6, 3.0)
    assert forecast(Moment(4, 2.0), 4) == Moment(4, 2.0)


def test_a_loss_that_is_not_finite_stops_training_and_names_the_group(ready: Experiment) -> None:
    params = change(ready, adamw={"table_lr": 1.0e30})
    with pytest.raises(UserError, match=r"step \d+, gradient not finite in: .*lower train") as caught:
        run_loop(ready, params)
    assert "\n" not in str(caught.value)


def test_running_out_of_memory_names_the_batch_size_and_what_to_lower() -> None:
    settings = load_params("records/r1150.yaml").train
    told = pytest.raises(UserError, match=r"micro_batch_tokens: 98304 tokens .* cpu; lower it")
    with told, memory_named(settings, ALONE):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_bad_input_is_one_line_before_any_training(ready: Experiment) -> None:
    shard = shard_paths(ready.folder / "artifacts/tokens", "train")[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert str(shard.relative_to(ready.folder)) in ready.fails("train", "--check", SEED)
    shutil.rmtree(ready.folder / "artifacts/tokens")
    assert "artifacts/tokens" in ready.fails("train", SEED)
    assert not (ready.folder / "artifacts/train").exists()


def test_a_fault_of_several_processes_is_told_once_and_without_a_traceback(ready: Experiment) -> None:
    change(ready, adamw={"table_lr": 1.0e30})
    arguments = ["--standalone", "--nproc-per-node=2", "-m", "stages.train", SEED]
    done = ready.run("python", "-m", "fairway.runtime.launch", *arguments, ok=False)
    assert done.stderr.count("error: params.yaml: train: loss") == 1, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_a_single_process_needs_no_launcher(tmp_path: Path) -> None:
    """As dvc.yaml starts it, it runs in the process that DVC waits for, and knows of no ranks."""
    (tmp_path / "shown.py").write_text("import os, sys; print(os.getppid(), 'RANK' in os.environ, __name__, *sys.argv)")
    command = [sys.executable, "-m", "fairway.runtime.launch", "--standalone", "--nproc-per-node=1", "-m", "shown", "7"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(os.getpid()), "False", "__main__", str(tmp_path / "shown.py"), "7"]


@pytest.mark.parametrize(("processes", "expected"), [(1, "trains 7\n"), (2, "checks 7\n")])
def test_several_processes_are_only_started_if_one_finds_that_they_can_run(
    processes: int, expected: str, tmp_path: Path
) -> None:
    """A single one finds out itself. What checks here says that nothing can run."""
    (tmp_path / "shown.py").write_text(
        "import sys\nchecks = sys.argv[1] == '--check'\n"
        "print('checks' if checks else 'trains', sys.argv[-1])\nsys.exit(3 if checks else 0)\n"
    )
    arguments = ["--check", "--standalone", f"--nproc-per-node={processes}", "-m", "shown", "7"]
    command = [sys.executable, "-m", "fairway.runtime.launch", *arguments]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (expected, 0 if processes == 1 else 3), done.stderr


def test_training_works_in_a_git_repository_without_a_commit(ready: Experiment) -> None:
    subprocess.run(["git", "init", "-q"], cwd=ready.folder, check=True)
    change(ready, max_steps=2)
    done = ready.run("python", "-m", "stages.train", SEED)
    assert "Traceback" not in done.stderr, done.stderr
    assert len(curve(ready, "train_loss")) == 2


def test_a_seed_that_params_do_not_list_is_refused(ready: Experiment) -> None:
    params = load_params(ready.folder / "params.yaml")
    with pytest.raises(UserError, match=r"params\.yaml: seeds: 7 is not one of \[1337\]"):
        check_training(params, 7, ready.folder / "artifacts/tokens", ready.folder / "resume")


def test_what_later_stages_will_miss_is_told_before_training(
    ready: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = yaml.safe_load((REPOSITORY / "records/r1172.yaml").read_text())["quantize"]
    record["gptq"] |= {"calibration": "text", "path": "nowhere.txt"}
    ready.set_params(ready.params | {"quantize": record})
    message = "error: params.yaml: quantize.gptq.path: nowhere.txt: no such file; expected UTF-8 text"
    assert ready.fails("train", "--check", SEED) == message
    record["gptq"] |= {"calibration": "train", "path": None}
    ready.set_params(ready.params | {"report": {"record": None, "baseline": "r9999"}})
    shutil.copytree(REPOSITORY / "records", ready.folder / "records", dirs_exist_ok=True)
    message = "params.yaml: report.baseline: no record 'r9999' in records/published.yaml (known: "
    assert message in ready.fails("train", "--check", SEED)
    ready.params["report"]["baseline"] = None
    ready.params["compress"]["codec"] = "lrzip"
    ready.set_params(ready.params)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "compress.codec: lrzip is not installed" in ready.fails("train", "--check", SEED)


def test_what_takes_no_time_is_checked_before_the_shards(ready: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a missing program is told in the words of the codec that starts it."""
    shutil.rmtree(ready.folder / "artifacts/tokens")
    ready.set_params(ready.params | {"compress": ready.params["compress"] | {"codec": "lrzip"}})
    params, place = load_params(ready.folder / "params.yaml"), (ready.folder / "tokens", ready.folder / "resume")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"^params\.yaml: seeds: 7 is not one of"):
        check_training(params, 7, *place)
    with pytest.raises(UserError) as of_codec:
        Lrzip().encode(b"data")
    with pytest.raises(UserError) as ahead:
        check_training(params, int(SEED), *place)
    assert str(ahead.value) == str(of_codec.value)
    monkeypatch.undo()
    params = params.model_copy(update={"compress": params.compress.model_copy(update={"codec": "ans"})})
    with pytest.raises(UserError, match=r"tokens/meta\.json: no such file"):
        check_training(params, int(SEED), *place)


@pytest.mark.parametrize("arguments", [[], ["x"], ["1", "2"], ["--check", "1"], ["-1"]])
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"usage: python -m stages\.train <seed>"):
        stage_arguments(arguments, "train")


@pytest.mark.parametrize("stage", ["fetch", "tokenize", "pack", "report", "submission"])
def test_a_stage_without_arguments_does_not_ignore_them(stage: str, experiment: Experiment) -> None:
    assert f"usage: python -m stages.{stage}; found: --help" in experiment.fails(stage, "--help")


@given(st.integers(1, 9))
def test_processes_must_divide_the_micro_batches(size: int) -> None:
    settings = Params.model_validate(tiny_params(Path("corpus.jsonl"))).train
    world = World(rank=0, size=size, device=torch.device("cpu"))
    if size in (1, 2):
        check_world(settings, world)
    else:
        with pytest.raises(UserError, match=f"{size} processes were started, which must divide the 2 micro-batches"):
            check_world(settings, world)


def test_depth_recurrence_begins_at_its_share_of_the_run(ready: Experiment) -> None:
    """With layers applied again from half-way on, only the steps from there on differ."""
    plain = run_loop(ready, change(ready, max_steps=6))[1]
    ready.params["model"]["loop"] = {"first": 0, "last": 1, "repeats": 1}
    looped = run_loop(ready, change(ready, schedule={"loop_from": 0.5}))[1]
    same = [a["train_loss"] == b["train_loss"] for a, b in zip(plain, looped, strict=True)]
    assert same[:3] == [True, True, True]
    assert not any(same[3:])


@pytest.mark.parametrize("kind", ["ste", "soft"])
def test_late_qat_changes_training_from_its_first_step_on(ready: Experiment, kind: str) -> None:
    plain = run_loop(ready, change(ready, max_steps=6, schedule={"warmdown": 1.0}))[1]
    rounding = {"kind": kind, "bits": 4, "min_clip": 0.0, "below_lr": 0.6, "min_step": 0, "ramp_steps": 2}
    rounded = run_loop(ready, change(ready, qat=rounding))[1]
    same = [a["train_loss"] == b["train_loss"] for a, b in zip(plain, rounded, strict=True)]
    assert same == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "settings",
    [
        {"loader": {"kind": "coprime", "names": "shards/train_%06d.bin"}},
        {"loader": {"kind": "packed", "bucket": 16}},
        # Rounded from the seventh step on, ever harder.
        {"qat": {"kind": "soft", "bits": 6, "min_clip": 0.0, "below_lr": 1.1, "min_step": 6, "ramp_steps": 6}},
    ],
    ids=["coprime", "packed", "rounded"],
)
def test_a_run_is_the_same_when_resumed(ready: Experiment, settings: dict[str, Any], tmp_path: Path) -> None:
    ready.params["train"] |= settings
    params = change(ready, checkpoint_every=8)
    points = ResumePoints(tmp_path / "resume", "same")
    straight, ticks = run_loop(ready, params, points)
    assert straight.train_loss < 0.9 * ticks[0]["train_loss"]
    resumed, rest = run_loop(ready, params, points)
    assert len(rest) == 4
    assert all(torch.equal(value, resumed.weights["last"][name]) for name, value in straight.weights["last"].items())


@pytest.mark.long
# torch checks the headers that it compiles for a CPU with openssl.
@pytest.mark.program(*COMPILER, "openssl")
def test_compiled_training_is_undone_before_it_counts(ready: Experiment) -> None:
    """Warm-up steps compile and leave nothing behind: the same losses as without compiler, to rounding."""
    ready.params["model"]["loop"] = {"first": 0, "last": 1, "repeats": 1}
    rounding = {"kind": "soft", "bits": 6, "min_clip": 0.0, "below_lr": 0.5, "min_step": 0, "ramp_steps": 4}
    eager = run_loop(ready, change(ready, schedule={"loop_from": 0.5}, qat=rounding))[1]
    compiled = run_loop(ready, change(ready, compile=True, warmup_steps=2))[1]
    for one, other in zip(eager, compiled, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-3)


def test_a_resume_point_without_its_tensors_is_told_in_one_line(tmp_path: Path) -> None:
    points = ResumePoints(tmp_path, "this one")
    points.save(3, {"weight": torch.zeros(2)}, {"step": 3})
    next(tmp_path.glob("*.safetensors")).write_bytes(b"half")
    with pytest.raises(UserError, match=f"step_00000003.safetensors: not readable .*; remove {tmp_path} to begin anew"):
        points.load()
