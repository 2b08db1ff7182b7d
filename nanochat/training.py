"""The training loop and what belongs to a run of it, for every script that trains: text, run folder, steps, evaluation, checkpoints.

What is trained is a `Learner`: here all of a GPT; an adapter (scripts/adapter_train.py) brings its own.
"""

import contextlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.distributed as dist

from nanochat import agreement, common, compiler, continuation, metrics, signals, writer
from nanochat.checkpoint_manager import (
    OWED,
    amend_checkpoint,
    fitting_together,
    load_checkpoint,
    load_newest,
    load_to_resume,
    not_finite,
    save_checkpoint,
)
from nanochat.common import InputError, as_whole_number, print0
from nanochat.core_bundle import Unavailable, open_bundle
from nanochat.core_eval import evaluate_core, questions
from nanochat.dataloader import Rows, training_batch, training_batches
from nanochat.dataset import Corpus, open_corpus
from nanochat.gpt import GPT
from nanochat.history_file import check_history
from nanochat.loss_eval import evaluate, reference_losses, sample_texts
from nanochat.optim import (
    build_optimizers,
    load_optimizer_state,
    muon_momentum,
    optimizer_state,
    split_parameters,
)
from nanochat.parallel import (
    any_process,
    average_gradients,
    differing_parameters,
    gather_state,
    names_anywhere,
    share_parameters,
    share_requests,
)
from nanochat.plan import print_plan
from nanochat.run_files import (
    check_ending,
    complete_summary,
    read_config,
    saved_steps,
    step_folder,
    summary_says_finished,
)
from nanochat.shared_text import confirm_caches, shared_text
from nanochat.token_cache import verify_caches
from nanochat.tokenizer import other_text

PATIENCE = 2.0  # seconds: a request to stop waits for the rest of a step that is no longer
# the meta of a run that has no checkpoint yet
START = {"step": 0, "total_training_time": 0.0, "bad_steps": 0, "bad_steps_in_a_row": 0}


class Learner:
    """What a run trains, and what of the model its checkpoints hold. This one trains every parameter that requires a gradient, and keeps them all."""

    draws = False  # whether a forward pass draws random numbers (dropout): each step's then come from a seed of its own, so that a resumed run draws the same
    starting = False  # whether the model is evaluated before its first step: it can do something already

    def __init__(self, model: GPT, rates: dict):
        """rates: the learning rates and settings of `optim.build_optimizers`."""
        self.model = model
        self.rates = rates

    def optimizers(self, pieces, dtype) -> list[torch.optim.Optimizer]:
        return build_optimizers(self.model, **self.rates, pieces=pieces, dtype=dtype)

    def before_update(self):
        """Called with the step's gradients, averaged over the processes; what it does to them it must do alike on all."""

    def after_update(self):
        """Called once every process has the step's new parameters."""

    def findings(self) -> dict:
        """What the record's entry of an evaluation holds besides."""
        return {}

    def state(self) -> dict:
        """Tensors, in dicts, that a checkpoint holds beside the optimizer's; `load` takes them back."""
        return {"model": self.model.state_dict()}

    def load(self, state: dict):
        self.model.load_state_dict(state["model"])

    def meta(self) -> dict:
        """What `adapters.loading.load_model` needs to know to build the model again, as JSON has it."""
        return {"model": asdict(self.model.config)}


# ---- the run folder -------------------------------------------------------------------------------------------------


def open_run(folder, given: str, config: dict, resume: str):
    """What to do with this run: None to start, (state, meta) of a checkpoint to go on from, or 'finished'. given: the flag that names it, and its tag.

    InputError: another config under this tag, a tag with checkpoints and no --resume, or a damaged record.
    """
    steps = saved_steps(folder)
    if not (folder / "config.json").exists():
        if steps:
            raise InputError(
                f"{given}: has checkpoints {steps} and no config.json, which says of what; "
                f"restore {folder / 'config.json'}, or choose another tag"
            )
        if resume not in ("-1", "auto"):
            raise InputError(f"--resume {resume}: there is no run {folder.name}")
        return None
    if differing := continuation.differences(read_config(folder), config["flags"], config["derived"]):
        raise InputError(
            f"{given}: exists with another config: {'; '.join(differing)}; choose another tag, or remove {folder}"
        )
    if summary_says_finished(folder):
        check_ending(folder)
        return "finished"
    if resume == "-1" and steps:
        raise InputError(
            f"{given}: has checkpoints {steps} and is not finished; "
            "continue it with --resume auto, or choose another tag"
        )
    saved = None
    if resume != "-1":
        saved = load_newest(folder) if resume == "auto" else load_to_resume(folder, int(resume))
    if not saved and steps and resume != "-1":  # they may be unreadable for a while only
        raise InputError(
            f"{given}: none of its checkpoints {steps} can be used; restore one, or remove "
            f"{folder / 'checkpoints'} to begin again"
        )
    if not saved:
        return None
    check_history(folder, saved[1])
    if saved[1].get("last"):  # killed after its last checkpoint, before its summary
        complete_summary(folder)
        return "finished"
    return saved


# ---- one step -------------------------------------------------------------------------------------------------------


def lr_multiplier(step: int, steps: int, warmup: int, warmdown_ratio: float, final: float) -> float:
    """Linear warmup, constant, linear warmdown to `final`. step: updates done so far."""
    warmdown = round(warmdown_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step < steps - warmdown:
        return 1.0
    return final + (1 - final) * (steps - step) / warmdown


def forward_backward(model, batches, micro_steps: int, place, dtype, stop) -> tuple[float | None, bool]:
    """Gradients, averaged over all micro-steps and processes, of one step's rows. Returns (mean loss over all
    of them, whether a process was asked to stop). The loss is None if one of them broke the step off for
    that: the gradients are then of no use.
    """
    device, rank, world_size = place
    total = torch.zeros(3, device=device)  # loss, requests to stop, processes that broke off
    started = time.perf_counter()
    for done in range(micro_steps):
        if done and stop.is_set():
            seconds_each = (time.perf_counter() - started) / done
            if (micro_steps - done) * seconds_each > PATIENCE:
                total[2] = 1
                break
        x, y = next(batches)
        loss = model(x, y, dtype) / micro_steps
        loss.backward()
        total[0] += loss.detach()
    total[1] = stop.is_set()
    if world_size > 1:
        average_gradients(model.parameters(), world_size)
        dist.all_reduce(total)
    loss, stops, broken_off = total.tolist()
    return None if broken_off else loss / world_size, stops > 0


def gradient_norm(model, clip: float) -> float:
    """The norm before clipping; clip <= 0: none."""
    if clip > 0:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()


def update(optimizers, pieces, place, step: int, lrm: float):
    """Update number `step` (from 0) from the gradients, each process its own pieces, then exchanged."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lrm
            if "momentum" in group:
                group["momentum"] = muon_momentum(step)
        optimizer.step()
    if place[2] > 1:
        share_parameters(pieces, place[1])


def core_questions(args, tokenizer, place):
    """(bundle, this process's questions) for evaluate_core; None if CORE is not measured, or there is no bundle, which is said."""
    if args.core_metric_every < 1:
        return None
    try:
        bundle = open_bundle(args.core_dir)
    except Unavailable as e:
        return print0(f"CORE is not measured: {e}")
    agreement.confirm(place, {"CORE bundle": bundle.fingerprint}, "give all processes the same --core-dir")
    return bundle, questions(bundle, tokenizer, args.max_seq_len, args.core_metric_max_per_task, *place[1:])


@dataclass
class Evaluation:
    """What is measured of the model after a step, and after which steps. All processes take part; only the
    first makes samples.
    """

    args: object
    learner: Learner
    tokenizer: object
    val_rows: Rows
    core: tuple | None  # core_questions
    place: tuple  # device, rank, number of processes
    dtype: torch.dtype
    steps: int  # of the run
    val_count: int  # rows

    def due(self, step: int) -> bool:
        own = self.falls_on(step, "eval_every") or self.falls_on(step, "sample_every")
        return step == self.steps or own or self.core_due(step)

    def falls_on(self, step: int, flag: str) -> bool:
        every = getattr(self.args, flag)
        return every > 0 and step % every == 0

    def core_due(self, step: int) -> bool:
        return bool(self.core) and self.falls_on(step, "core_metric_every")

    def losses(self, stop) -> dict | None:
        device, rank, world_size = self.place
        return evaluate(
            self.learner.model,
            self.val_rows,
            self.val_count,
            self.tokenizer.token_bytes(),
            self.args.device_batch_size,
            device,
            self.dtype,
            rank,
            world_size,
            stop,
        )

    def __call__(self, step: int, stop) -> tuple[dict, bool] | None:
        """(values for the record, whether the run ends with this step). None if this process broke off
        because a process was asked to stop; what the others then return is void.
        """
        args = self.args
        model = self.learner.model
        values = {}
        last = step == self.steps
        if last or self.falls_on(step, "eval_every"):
            losses = self.losses(stop)
            if losses is None:
                return None
            values |= losses | self.learner.findings()
            last = last or losses["val/ppl"] <= args.stop_at_ppl
        if self.core_due(step) or (self.core and last):
            tokens_at_once = args.device_batch_size * args.max_seq_len
            core = evaluate_core(model, *self.core, self.dtype, tokens_at_once, stop)
            if core is None:
                return None
            values["core_metric"] = core["core_metric"]
            values |= {
                f"centered_results/{label}": score for label, score in core["centered_results"].items()
            }
        if self.place[1] == 0 and (self.falls_on(step, "sample_every") or (last and args.sample_every > 0)):
            samples = sample_texts(model, self.tokenizer, self.val_rows, self.dtype, stop)
            if samples is None:
                return None
            values["sample"] = samples
        return values, last


def in_words(values: dict) -> str:
    """What the line of a step says of an evaluation."""
    line = f" | val ppl {values['val/ppl']:.2f}, bpb {values['val/bpb']:.4f}" if "val/ppl" in values else ""
    return line + (f" | CORE {values['core_metric']:.4f}" if "core_metric" in values else "")


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


# ---- a run ----------------------------------------------------------------------------------------------------------


def check_resume(resume: str):
    if resume not in ("-1", "auto") and (as_whole_number(resume) or 0) < 1:
        raise InputError(f"--resume {resume}: use auto, or the number of a saved step")


@dataclass
class Text:
    """What a run reads: tokenised once, then memory-mapped."""

    corpus: Corpus
    train_rows: Rows
    val_rows: Rows
    val_count: int  # validation rows that are evaluated


def run(
    args,
    tag: str,
    config,
    plan: dict,
    accounting: dict,
    tokenizer,
    start,
    build,
    tag_flag: str = "--model-tag",
    open_text=None,
    **derived,
):
    """Train `build(device)`, a Learner, in the folder of this tag, on --data, to the end of the plan. Exits
    with `signals.exit_code` if it was asked to stop before.

    start: (state, meta) of what a new run begins with, state None: as built. tag_flag: the flag that named
    it. open_text(): the text, where that is not simply --data. derived: more that config.json is to hold and
    that a resumed run must have in common with it.
    """
    device_type = common.pick_device_type(args.device_type)
    folder = metrics.runs_dir() / tag
    place = device, rank, world_size = common.init_process(device_type)
    dtype = agreement.from_first(place, dtype_of, args, folder, device_type)
    agreement.confirm(place, own_values(args, tag, config, plan, tokenizer, start, derived))
    text = open_rows(args, open_text or partial(open_corpus, args.data), tokenizer, place)
    derived = {"model": asdict(config), **plan, "tokenizer_hash": tokenizer.hash, **derived}
    run_config = agreement.from_first(place, config_of, args, derived, text, tokenizer, place, dtype, folder)
    with contextlib.ExitStack() as stack:
        lock = None
        saved = None
        if rank == 0:
            path = common.get_base_dir() / "locks" / f"{tag}.lock"
            lock = stack.enter_context(common.claimed(path, f"{tag_flag} {tag}: {folder}"))
            # a checkpoint that was still being written is there for all of them now, or for none
            saved = open_run(folder, f"{tag_flag} {tag}", run_config, args.resume)
            metrics.remove_left_overs(folder)
        saved = follow_first(place, folder, saved)
        if saved == "finished":
            return print0(f"{tag}: already finished, see {folder}")
        core = core_questions(args, tokenizer, place)
        if rank == 0:
            run_config["reference_losses"] = reference_losses(
                text.train_rows, text.val_rows, text.val_count, tokenizer.vocab_size
            )
        agreement.meet(place)  # every process is ready before process 0 writes into the folder
        stop = train(
            args,
            build(device),
            run_config,
            accounting,
            saved or start,
            folder,
            tokenizer,
            text.train_rows,
            text.val_rows,
            core,
            place,
            dtype,
            lock,
        )
    if stop:
        common.end_process()
        sys.exit(signals.exit_code(stop.number))


def dtype_of(args, folder, device_type: str) -> torch.dtype:
    before = metrics.dtype_so_far(folder, device_type)
    return common.compute_dtype(args.dtype, device_type, training=True, before=before)


def own_values(args, tag: str, config, plan: dict, tokenizer, start, derived: dict) -> dict:
    """What each process has by itself and all must have in common. Of what flags name, the content counts."""
    named = {*continuation.PLACES, "core_dir"}
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in named}
    return {
        **flags,
        "tag": tag,
        "tokenizer": tokenizer.hash,
        "model": asdict(config),
        "plan": plan,
        "start": start[1],
        **derived,
    }


def open_rows(args, open_text, tokenizer, place) -> Text:
    """The text that process 0 lists, as rows of tokens that are the same in all processes.

    InputError: too little text, or files or a token cache that differ from those of process 0.
    """
    corpus = shared_text(place, open_text)
    args.data = args.data or corpus.place
    print0(corpus.line())
    if line := other_text(tokenizer, corpus):
        print0(line)
    if args.verify:
        shards = [*corpus.train, *corpus.val]
        verify_caches(shards, tokenizer)
        agreement.meet(place)  # nobody maps a cache that another process is building again
        print0(f"token caches: {len(shards):,} read whole and compared with their sums")
    train_rows = Rows(corpus.train, tokenizer, args.max_seq_len, args.seed)
    val_rows = Rows(corpus.val, tokenizer, args.max_seq_len)
    val_count = min(val_rows.count, args.eval_tokens // args.max_seq_len)
    for split, rows in (("training", train_rows), ("validation", val_rows)):
        if not rows.count:
            raise InputError(
                f"--data {args.data}: too little {split} text for one row of {args.max_seq_len} tokens; add text or lower --max-seq-len"
            )
    if not val_count:
        raise InputError(
            f"--eval-tokens {args.eval_tokens}: less than one row of --max-seq-len {args.max_seq_len}"
        )
    confirm_caches(place, tokenizer, corpus.train + corpus.val)
    return Text(corpus, train_rows, val_rows, val_count)


def config_of(args, derived: dict, text: Text, tokenizer, place, dtype, folder) -> dict:
    """What config.json is to hold."""
    corpus = text.corpus
    (device, _, world_size) = place
    fingerprints = {f"{split}_fingerprint": corpus.fingerprint(split) for split in ("train", "val")}
    return {
        "flags": vars(args),
        "given": sorted(args.given | continuation.flags_given(continuation.read_record(folder))),
        "derived": {
            **derived,
            "val_tokens": text.val_count * args.max_seq_len,
            "corpus": {"name": corpus.name, "path": corpus.path, **fingerprints},
            "epoch_rows": text.train_rows.count,
            "dropped_fraction": text.train_rows.dropped,
        },
        "text": corpus.record(),  # names of files: a resumed run need not have them in common
        "tokenizer": {"hash": tokenizer.hash, "trained_on": tokenizer.trained_on},
        "git": metrics.git_state(),
        "versions": metrics.versions(),
        "seed": args.seed,
        "device": {
            "type": device.type,
            "name": common.device_name(device),
            "processes": world_size,
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
        },
    }


def follow_first(place, folder, saved):
    """What open_run returned in process 0, in all processes: of a checkpoint each reads it by itself."""
    meta = saved[1] if isinstance(saved, tuple) else saved
    meta = agreement.from_first(place, lambda: meta)
    if place[1] == 0:
        return saved
    if not isinstance(meta, dict):
        return meta
    load = partial(load_checkpoint, folder, meta["step"])
    return agreement.load_confirmed(load, step_folder(folder, meta["step"]), meta)


def train(
    args,
    learner: Learner,
    run_config,
    accounting,
    start,
    folder,
    tokenizer,
    train_rows: Rows,
    val_rows: Rows,
    core,
    place,
    dtype,
    lock,
) -> signals.StopRequest | None:
    """From `start`, (state, meta), to the last step. Returns the request to stop that ended it before, with
    its state saved; else None.

    lock: the locks.Lock, on the first process, by which it holds the folder.
    """
    (device, rank, world_size) = place
    plan = run_config["derived"]
    state, meta = start

    model = learner.model
    config = learner.model.config
    pieces = split_parameters(model, world_size)
    optimizers = learner.optimizers(pieces[rank], dtype)
    if meta["step"] and "optimizer" not in state:
        raise InputError(
            f"--resume: the checkpoints in {folder} are of an earlier version of this program, whose optimizer differs; choose another tag"
        )
    with fitting_together(step_folder(folder, meta["step"])):
        if state:
            learner.load(state)
        if meta["step"]:
            load_optimizer_state(optimizers, pieces[rank], state["optimizer"])
    del state
    if world_size > 1 and (names := differing_parameters(model)):
        raise InputError(
            f"{folder}: the processes begin with different values of {', '.join(names[:3])} and "
            f"{len(names)} parameter(s) in all; nothing was written: let all see the same files"
        )

    record = None
    if rank == 0:
        tokenizer.save(folder / "tokenizer.json")
        record = metrics.RunRecord(
            folder, run_config, accounting, args.run, args.ppl_thresholds, meta["step"], lock
        )
    print_plan(config, plan, accounting, args)
    print0(
        f"run: {folder} on {run_config['device']['name']}, {world_size} process(es), {run_config['device']['dtype']}"
        + (f", from step {meta['step']}" if meta["step"] else "")
    )

    def way_back():
        return f"the last good weights are in {folder / 'checkpoints'}: {saved_steps(folder) or 'none'}; lower the learning rates or set --grad-clip 1.0"

    def end_diverged(step):
        if record:
            record.summarize("diverged")
        raise InputError(
            f"step {step}: loss or gradient not finite in {bad_in_a_row} steps in a row "
            f"(--max-bad-steps {args.max_bad_steps}); {way_back()}"
        )

    def save(step, last, owed=False):
        mine = {**learner.state(), "optimizer": optimizer_state(optimizers)}
        if broken := names_anywhere(place, not_finite(mine)):
            raise InputError(
                f"step {step}: {broken[0]} and {len(broken)} tensor(s) in all are not finite; "
                f"nothing was saved; {way_back()}"
            )
        if world_size > 1 and (names := differing_parameters(model)):
            raise InputError(
                f"step {step}: the processes hold different values of {', '.join(names[:3])} and {len(names)} parameter(s) in all; "
                "nothing was saved: continue from the checkpoint before with --resume auto"
            )
        whole = gather_state(optimizers, model, rank, world_size)
        if not record:
            return
        lock.check()
        state = {**learner.state(), "optimizer": whole}
        now = {
            "total_training_time": seconds,
            "bad_steps": bad_steps,
            "bad_steps_in_a_row": bad_in_a_row,
            "tokenizer_hash": tokenizer.hash,
            "flags": continuation.deciding(vars(args)),
            **learner.meta(),
            **record.commit(),
            "last": last,
        }
        if owed:
            now[OWED] = True
        if writer.under_launcher():
            write = partial(save_checkpoint, folder, step, writer.on_cpu(state), now, keep=args.keep)
            writer.write_apart(write, lock, partial(record.summarize, "finished" if last else "stopped"))
        else:
            save_checkpoint(folder, step, state, now, keep=args.keep)

    if compiler.wanted(args.compile, device.type, plan["tokens"] * accounting["flops/per_token"]):
        # a batch of the shapes to come
        x, y = training_batch(train_rows, 0, rank, world_size, args.device_batch_size, 0, device)
        compiler.compile_if_possible(
            model, args.compile, device, world_size, lambda: model(x, y, dtype).backward()
        )

    # the loop; `step` counts finished updates, so a checkpoint of step k continues with update k + 1
    steps = plan["num_iterations"]
    rows_per_step = plan["total_batch_size"] // args.max_seq_len
    seconds = meta["total_training_time"]
    bad_steps = meta["bad_steps"]  # loss or gradient not finite
    bad_in_a_row = meta.get("bad_steps_in_a_row", 0)
    peak = metrics.peak_flops(run_config["device"]["name"])
    batches = training_batches(
        train_rows, meta["step"] * rows_per_step, rank, world_size, args.device_batch_size, device
    )
    val_count = plan["val_tokens"] // args.max_seq_len
    evaluation = Evaluation(args, learner, tokenizer, val_rows, core, place, dtype, steps, val_count)
    metrics.reset_peak_memory(device)

    def entry_of(step):
        tokens = step * plan["total_batch_size"]
        return {
            "step": step,
            "total_tokens": tokens,
            "total_training_time": seconds,
            "total_training_flops": tokens * accounting["flops/per_token"],
        }

    def measure(step, entry, line, stopping):
        """Add to the entry what is to be measured after this step, and record it. Returns whether
        the run ends with it, whether a process was asked to stop, and whether the measuring is
        owed: put off for that.
        """
        last = False
        owed = False
        if evaluation.due(step):
            result = None if stopping else evaluation(step, stop)
            stopping, owed = any_process(place, stopping or stop.is_set(), result is None)
            if not owed:
                values, last = result
                entry |= values
                line += in_words(values)
        print0(line)
        if record:
            record.log(entry | {"mem/peak_bytes": metrics.peak_memory_bytes(device)})
        return last, stopping, owed

    def show_samples(entry):
        if "sample" in entry:
            print0("\n".join(f"  sample: {text!r}" for text in entry["sample"]))

    if world_size > 1:
        dist.barrier()  # a signal before this ends all processes, one after it lets all of them save
    with signals.stop_signals() as stop, share_requests(stop):
        if record:
            record.summarize("running")
        step = saved = meta["step"]
        if step == steps and bad_in_a_row > args.max_bad_steps:
            end_diverged(step)
        last = step == steps
        stopping = False
        owed = OWED in meta
        if learner.starting and step == 0:
            losses = evaluation.losses(stop)
            stopping = losses is None
            if losses:
                print0(f"before training | val ppl {losses['val/ppl']:.2f}, bpb {losses['val/bpb']:.4f}")
            if losses and record:
                record.log(entry_of(0) | losses)
        if owed:
            entry = entry_of(step)
            last, stopping, owed = measure(step, entry, f"step {step:05d}/{steps:05d}, evaluated now", False)
            show_samples(entry)
            if record and not owed:
                amend_checkpoint(folder, step, {OWED: None, "last": last, **record.commit()})
        while not (last or stopping):
            step += 1
            lrm = lr_multiplier(step - 1, steps, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac)
            started = time.perf_counter()
            if learner.draws:
                # a hash of whole numbers: the same in every process
                torch.manual_seed(hash((args.seed, step, rank)))
            loss, stopping = forward_backward(model, batches, plan["grad_accum_steps"], place, dtype, stop)
            if loss is None:  # broken off: the model is still that of the step before
                step -= 1
                break
            grad_norm = gradient_norm(model, args.grad_clip)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite:
                learner.before_update()
                update(optimizers, pieces, place, step - 1, lrm)
                learner.after_update()
            model.zero_grad()
            if evaluation.due(step) and device.type == "cuda":
                # so that the evaluation does not wait for the update on its own clock
                torch.cuda.synchronize()
            dt = time.perf_counter() - started
            seconds += dt
            speed = plan["total_batch_size"] / dt
            entry = entry_of(step) | {
                "train/lrm": lrm,
                "train/dt": dt,
                "train/tok_per_sec": speed,
                "train/epoch": step * rows_per_step / train_rows.count,
            }
            if finite:
                entry |= {"train/loss": loss, "train/grad_norm": grad_norm}
                bad_in_a_row = 0
            else:  # the same on every process: loss and gradients are means over all
                bad_steps = bad_steps + 1
                bad_in_a_row = bad_in_a_row + 1
                entry["train/bad_steps"] = bad_steps
            if peak:
                entry["train/mfu"] = speed * accounting["flops/per_token"] / (peak * world_size)
            if step == meta["step"] + 1:  # what is really held, measured once every tensor exists
                entry |= {
                    "mem/weights_bytes": bytes_of((*model.parameters(), *model.buffers())),
                    "mem/optimizer_bytes": bytes_of(
                        t for o in optimizers for s in o.state.values() for t in s.values()
                    ),
                }
            minutes = (steps - step) * seconds / step / 60
            line = (
                f"step {step:05d}/{steps:05d} | loss {loss:.4f} | {speed:,.0f} tok/s | ETA {minutes:.1f} min"
            )
            line += "" if finite else f" | not finite (gradient norm {grad_norm}): not applied"

            last, stopping, owed = measure(step, entry, line, stopping)
            if bad_in_a_row > args.max_bad_steps:
                save(step, False, owed)  # none of the bad steps was applied: these are the last good weights
                end_diverged(step)
            if last or stopping or (args.save_every > 0 and step % args.save_every == 0):
                save(step, last, owed)
                saved = step
                (stopping,) = any_process(place, stopping or stop.is_set())  # heard while it was written
                if record and not (last or stopping):
                    record.summarize("running")
            show_samples(entry)
        if step != saved:  # the step after it was broken off
            save(step, last)
        elif record and last and meta.get("last") is False:  # more bad steps are allowed now
            amend_checkpoint(folder, step, {"last": True})
        if record:
            record.summarize("finished" if last else "stopped")
    if world_size > 1:
        dist.barrier()  # the launcher ends whoever still writes the checkpoint once another process has left
    if record:
        record.close()
        unapplied = ""
        if bad_steps:
            unapplied = f"; {bad_steps} of {step} steps were not applied, loss or gradient not finite"
        print0(
            f"finished: {folder}{unapplied}"
            if last
            else f"stopped after step {step} as asked; continue with --resume auto"
        )
    return None if last else stop
