r"""Pretrain a GPT, full rank or low rank. The training loop is here; other scripts that train import it.

    python -m scripts.base_train --depth 4 --model-dim 256 --head-dim 64 --data stdlib
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- \
        --depth 20 --attn-rank 0.25 --mlp-rank 0.25

One run is one folder, $NANOCHAT_BASE_DIR/runs/<model-tag>: config.json, metrics.jsonl, summary.json,
tokenizer.json and checkpoints/. Bad flags are reported in one line (exit 2) before any work.
"""

import sys
import time
from contextlib import closing
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist

from nanochat import agreement, common, compiler, metrics, naming, parallel, recompute, signals, step_metrics
from nanochat.budget import choose_model, print_frontier
from nanochat.checkpoint_manager import fitting_together
from nanochat.continuation import inherit, read_record, tag_by_default
from nanochat.dataloader import training_batch, training_batches
from nanochat.dataset import open_corpus
from nanochat.devices import compute_dtype, pick_device_type, reset_peak_memory
from nanochat.errors import InputError
from nanochat.evaluation import Evaluation, core_questions, is_multiple, print_samples
from nanochat.fp8 import check_float8, train_in_float8
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import reference_losses
from nanochat.memory import check_memory, flags_in_errors, print_cards, training_costs
from nanochat.mlp_kernel import check_mlp_flags, use_mlp_kernel
from nanochat.optim import Muon, Rates, load_optimizer_state, lr_multiplier, muon_momentum
from nanochat.plan import parse_flags, print_plan, take_device_batch, training_plan
from nanochat.processes import end_process, print0, process_layout
from nanochat.run_files import step_folder
from nanochat.run_folder import FINISHED, check_resume, lock_folder
from nanochat.run_inputs import first_weights, vocabulary
from nanochat.run_output import RunOutput
from nanochat.run_setup import RunSpec, TrainingRun, start_run
from nanochat.run_state import RunState
from nanochat.subspace import config as subspace
from nanochat.subspace import costs as subspace_costs
from nanochat.subspace.trainable import SubspaceTrainable
from nanochat.trainable import Trainable

STOP_PATIENCE = 2.0  # seconds: a step that takes longer is broken off when a process is asked to stop


def main(argv=None):
    args = parse_flags(argv)
    spec = plan_run(args)
    if spec is None:  # --plan and --dry-run only print
        return
    run = start_run(spec)  # the processes meet and open the text
    with lock_folder(run) as checkpoint, flags_in_errors(args):
        if checkpoint == FINISHED:
            print0(f"{spec.tag}: already finished, see {run.folder}")
            return
        model = build_model(spec.config, args.seed, run.world.device)
        if args.fp8:
            train_in_float8(model)
        trainable = build_trainable(model, args, spec.plan["matrix_lr"])
        stop = train(run, trainable, checkpoint)
    end_run(stop)


# ---- the plan: everything that can be wrong is found here, before anything is touched ----------------------


def plan_run(args) -> RunSpec | None:
    """What the flags decide. --plan and --dry-run only print it: then None."""
    check_resume(args.resume)
    check_mlp_flags(args)
    world_size = process_layout().size
    tokenizer, vocab_size = vocabulary(args)
    device_type = pick_device_type(args.device_type)
    dtype = compute_dtype(args.dtype, device_type, training=True)
    if args.plan:
        print_frontier(args, vocab_size, world_size, dtype.itemsize)
        return None
    tag = args.model_tag
    if not tag:
        tag = tag_by_default(args, lambda flags: naming.default_tag(flags, choose_model(flags, vocab_size)))
    inherit(args, read_record(metrics.runs_dir() / tag), tag)
    config = choose_model(args, vocab_size)
    subspace_config = subspace.from_flags(args, config)
    weights, derived = first_weights(args, tokenizer)
    plan = training_plan(args, config, world_size)
    take_device_batch(args, plan, world_size)
    accounting = training_costs(config, args, plan, device_type, dtype.itemsize, world_size)
    if subspace_config:
        derived["subspace"] = asdict(subspace_config)
        accounting = subspace_costs.account(subspace_config, config, accounting)
        subspace_costs.check_memory(subspace_config, config, dtype.itemsize, device_type)
    if args.dry_run:
        print_plan(config, plan | derived, accounting, args)
        print_cards(config, args, plan, world_size)
        return None
    if not args.model_tag:
        naming.check_tag("--model-tag is missing, and", tag)
    check_memory(args, accounting, device_type)
    check_float8(args, config, device_type)
    open_text = partial(open_corpus, args.data)
    return RunSpec(
        args, tag, config, plan, accounting, tokenizer, open_text, weights=weights, derived=derived
    )


# ---- the model ---------------------------------------------------------------------------------------------


def build_model(config: GPTConfig, seed: int, device: torch.device) -> GPT:
    torch.manual_seed(seed)
    with torch.device(device):
        model = GPT(config)
        model.init_weights()
    recompute.apply(model)
    return model


def build_trainable(model: GPT, args, matrix_lr: float) -> Trainable:
    rates = Rates(args.embedding_lr, args.unembedding_lr, matrix_lr, args.scalar_lr, args.weight_decay)
    if args.subspace:
        return SubspaceTrainable(model, rates, subspace.from_flags(args, model.config), args.subspace_lr)
    return Trainable(model, rates)


# ---- training ----------------------------------------------------------------------------------------------


def train(run: TrainingRun, trainable: Trainable, checkpoint: tuple | None) -> signals.StopRequest | None:
    """Train from the checkpoint, (state, meta), or from step 0, to the last step.

    Returns None, or the request to stop that ended the training earlier. Then the state is saved.
    """
    world = run.world
    tensors, meta = checkpoint or (run.spec.weights, {})
    evaluation = Evaluation(run, trainable, core_questions(run))
    state = restore(run, trainable, tensors, meta)
    output = open_output(run, trainable, meta)
    use_mlp_kernel(trainable.model, run.args.mlp_kernel)
    compile_model(run, trainable.model)
    reset_peak_memory(world.device)
    if world.size > 1:
        dist.barrier()  # a signal before this ends all processes, one after it lets all of them save
    first_row = state.step * run.rows_per_step
    batches = training_batches(run.text.train_rows, first_row, run.args.device_batch_size, world)
    with signals.stop_signals() as stop, parallel.share_requests(stop), output.writer, closing(batches):
        output.summarize("running")
        before_training(run, evaluation, output, state, stop)
        train_steps(run, trainable, batches, evaluation, output, state, stop)
        if state.step != output.saved_step:  # the step after it was broken off
            output.save(state)
        output.wait_for_writers()
        output.summarize("finished" if state.last else "stopped")
    if world.size > 1:
        dist.barrier()  # the launcher ends whoever has work left once another process has left
    output.close(state)
    return None if state.last else stop


def train_steps(
    run: TrainingRun, trainable: Trainable, batches, evaluation, output: RunOutput, state: RunState, stop
):
    """The training loop. `state.step` counts finished updates."""
    args = run.args
    world = run.world
    first = state.step + 1
    for step in range(first, run.steps + 1):
        if state.last or state.stopping:
            break
        started = time.perf_counter()
        if trainable.has_dropout:
            torch.manual_seed(hash((args.seed, step, world.rank)))  # a resumed run drops the same
        micro_steps = run.plan["grad_accum_steps"]
        loss, state.stopping = forward_backward(trainable, batches, micro_steps, run.dtype, stop)
        if loss is None:  # broken off: the model is still that of the step before
            break
        lrm = lr_multiplier(step - 1, run.steps, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
        result = step_metrics.StepResult(loss, gradient_norm(trainable, args.grad_clip), lrm)
        if result.is_finite:  # on all processes or on none
            trainable.before_update()
            update(trainable, step - 1, lrm)
            trainable.after_update()
        trainable.exchange.clear()
        if evaluation.is_due(step) and world.device.type == "cuda":
            torch.cuda.synchronize()  # so that the evaluation does not wait for the update on its own clock
        result.seconds = time.perf_counter() - started
        state.count_step(result.seconds, result.is_finite)

        entry = step_metrics.step_entry(run, state, result)
        if step == first:  # measured once every tensor exists
            entry |= step_metrics.memory_entry(trainable)
        values = evaluation.after_step(state, stop)
        print0(step_metrics.step_line(run, state, result) + step_metrics.evaluation_words(values))
        output.log(entry | values | step_metrics.peak_memory(run))

        if state.bad_steps_in_a_row > args.max_bad_steps:
            state.last = False
            output.save(state)  # the last good weights: no bad step was applied
            output.end_diverged(state)
        if state.last or state.stopping or is_multiple(step, args.save_every):
            output.save(state)
            # a request to stop may have come meanwhile
            (state.stopping,) = parallel.any_process(world, state.stopping or stop.is_set())
            if not (state.last or state.stopping):
                output.summarize("running")
        print_samples(values)


def forward_backward(
    trainable: Trainable, batches, micro_steps: int, dtype: torch.dtype, stop: signals.StopRequest
) -> tuple[float | None, bool]:
    """Gradients of one step's rows, averaged over all micro-steps and processes: see exchange.py.

    Returns (mean loss of all rows, whether a process was asked to stop). The loss is None if a process broke
    the step off because of that. Then the gradients are of no use.
    """
    world = trainable.exchange.world
    total = torch.zeros(3, device=world.device)  # loss, requests to stop, processes that broke off
    started = time.perf_counter()
    for micro_step in range(micro_steps):
        if micro_step and stop.is_set():
            seconds_each = (time.perf_counter() - started) / micro_step
            if (micro_steps - micro_step) * seconds_each > STOP_PATIENCE:
                total[2] = 1
                break
        x, y = next(batches)  # (device batch, sequence length) each
        loss = trainable.model(x, y, dtype) / micro_steps
        if micro_step == micro_steps - 1:
            trainable.exchange.start()  # gradients leave while the backward pass goes on
        loss.backward()
        total[0] += loss.detach()
    if stop.is_set():  # to write a number into a GPU's memory is to wait for it
        total[1] = 1
    trainable.exchange.finish()
    if world.size > 1:
        dist.all_reduce(total)
    loss, stops, broken_off = total.tolist()
    return None if broken_off else loss / world.size, stops > 0


def gradient_norm(trainable: Trainable, clip: float) -> float:
    """Clip the gradients by their norm over all processes, and return it. clip <= 0: do not clip."""
    norm = trainable.exchange.norm()
    if clip > 0:
        trainable.exchange.scale(torch.clamp(clip / (norm + 1e-6), max=1.0))
    return norm.item()


def update(trainable: Trainable, step: int, lrm: float):
    """Update number `step` (from 0): each process updates its own shards, and all get the new values."""
    for optimizer in trainable.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
            if "momentum" in group:
                group["momentum"] = muon_momentum(step)
        optimizer.step()
        trainable.exchange.share(by_muon=isinstance(optimizer, Muon))
    trainable.exchange.wait()


# ---- before the first step ---------------------------------------------------------------------------------


def restore(run: TrainingRun, trainable: Trainable, tensors: dict | None, meta: dict) -> RunState:
    """Take over a checkpoint, and make the optimizers. meta: {} for first weights alone.

    InputError where it does not fit, or where the processes have different ones.
    """
    state = RunState.from_meta(meta)
    state.last = state.step == run.steps
    if meta and "optimizer" not in tensors:
        raise InputError(
            f"--resume: the checkpoints in {run.folder} are of an earlier version of this program, whose "
            "optimizer differs; choose another tag"
        )
    folder = step_folder(run.folder, state.step)
    if tensors:
        with fitting_together(folder):
            trainable.load(tensors)
    if names := parallel.differing_parameters(trainable.model, run.world):
        raise InputError(
            f"{run.folder}: the processes begin with different values of {', '.join(names[:3])} and "
            f"{len(names)} parameter(s) in all; nothing was written: let all see the same files"
        )
    trainable.make_optimizers(run.world, run.dtype)
    if meta:
        with fitting_together(folder):
            load_optimizer_state(trainable.optimizers, trainable.shards, tensors["optimizer"])
    return state


def open_output(run: TrainingRun, trainable: Trainable, meta: dict) -> RunOutput:
    """Open the record, and print what is trained."""
    if run.is_first_process:
        validation = run.text.validation
        vocab_size = run.spec.tokenizer.vocab_size
        run.config["reference_losses"] = reference_losses(run.text.train_rows, validation, vocab_size)
    agreement.meet(run.world)  # every process is ready before process 0 writes into the folder
    output = RunOutput(run, trainable, meta)
    print_plan(trainable.model.config, run.config["derived"], run.spec.accounting, run.args)
    device = run.config["device"]
    line = f"run: {run.folder} on {device['name']}, {run.world.size} process(es), {device['dtype']}"
    print0(f"{line}, from step {meta['step']}" if meta else line)
    return output


def compile_model(run: TrainingRun, model: GPT):
    """Compile the blocks if --compile says so. The first training batch shows the compiler the shapes."""
    args = run.args
    device, _, size = run.world
    flops = run.plan["tokens"] * run.spec.accounting["flops/per_token"]
    if compiler.should_compile(args, device.type, flops):
        x, y = training_batch(run.text.train_rows, 0, args.device_batch_size, run.world)
        compiler.compile_if_possible(model, args, device, size, lambda: model(x, y, run.dtype).backward())


def before_training(run: TrainingRun, evaluation: Evaluation, output: RunOutput, state: RunState, stop):
    """Evaluate a model that was trained before, and finish what an earlier process left undone."""
    if state.last and state.bad_steps_in_a_row > run.args.max_bad_steps:
        output.end_diverged(state)
    if run.spec.evaluate_first and state.step == 0:
        losses = evaluation.losses(stop)
        state.stopping = losses is None
        if losses:
            print0(f"before training{step_metrics.evaluation_words(losses)}")
            output.log(step_metrics.clocks(run, state) | losses)
    if state.evaluation_owed:
        values = evaluation.after_step(state, stop)
        print0(f"step {state.step:05d}/{run.steps:05d}, evaluated now{step_metrics.evaluation_words(values)}")
        output.log(step_metrics.clocks(run, state) | values | step_metrics.peak_memory(run))
        print_samples(values)
        if not state.evaluation_owed:
            output.settle_evaluation(state)
    elif state.last:
        output.declare_last()


def end_run(stop: signals.StopRequest | None):
    """Exit with `signals.exit_code` if a process was asked to stop before the last step."""
    if stop:
        end_process()
        sys.exit(signals.exit_code(stop.number))


if __name__ == "__main__":
    common.run_script(main)
