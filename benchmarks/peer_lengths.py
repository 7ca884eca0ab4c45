"""W5 of a peer: DPO steps on the token lists that `real_lengths.write_pairs` wrote.

    PEER_PYTHON benchmarks/peer_lengths.py --peer trl --pairs PAIRS.json --bench BENCH_FOLDER

Runs in the peer's own Python, which need not hold paxo or jax. TRL pads each batch to its longest
sequence; Tunix takes fixed shapes, prompts and completions padded to the lengths given, and the
time to compile is not counted. Prints one line, `JSON {...}`, as `w5` does.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings


def main() -> int:
    """Measures and prints the line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", required=True, choices=("trl", "tunix"))
    parser.add_argument("--pairs", required=True, help="file of token lists")
    parser.add_argument("--bench", required=True, help="folder of common.py")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=384, help="Tunix pads prompts to it")
    parser.add_argument("--completion", type=int, default=256, help="and completions to it")
    options = parser.parse_args()
    sys.path.insert(0, options.bench)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import common

    with open(options.pairs) as file:
        rows = json.load(file)[: options.batch * (options.warmup + options.steps)]
    meter = {"trl": trl, "tunix": tunix}[options.peer](common, rows, options)
    walls, cpus = (sum(lap[key] for lap in meter.laps) for key in ("wall", "cpu"))
    pairs = options.batch * len(meter.laps)
    common.emit(
        bench="lengths", peer=options.peer, workload="W5", step=meter.summary(), pairs=pairs,
        pairs_per_s=pairs / walls, pairs_per_cpu_s=pairs / cpus, threads=common.THREADS,
        peak_rss_mb=common.peak_rss_mb(), peak_steady_mb=common.hwm_mb(),
    )  # fmt: skip
    return 0


def trl(common, rows, options):
    """Laps of TRL's DPOTrainer with a separate reference."""
    import datasets
    import torch
    import transformers
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(common.THREADS)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    workload = common.WORKLOADS["W1"]
    weights = common.make_params(workload)
    word = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
    columns = [
        {"prompt": word(p), "chosen": " " + word(c), "rejected": " " + word(r)} for p, c, r in rows
    ]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.batch,
        max_steps=options.warmup + options.steps, learning_rate=1e-4, beta=common.BETA,
        max_length=None, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        bf16=False, fp16=False, gradient_checkpointing=False, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.0, max_grad_norm=0.0, disable_tqdm=True, seed=0,
    )  # fmt: skip
    meter = common.Meter()

    class Laps(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            meter.lap()
            if state.global_step == options.warmup:
                common.reset_peak_rss()
                meter.drop()

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    with contextlib.redirect_stdout(io.StringIO()):
        trainer = InOrder(
            model=common.hf_model(workload, weights),
            ref_model=common.hf_model(workload, weights),
            args=config,
            train_dataset=datasets.Dataset.from_list(columns),
            processing_class=common.build_tokenizer(workload["vocab"]),
            callbacks=[Laps()],
        )
        meter.mark()
        trainer.train()
    return meter


def tunix(common, rows, options):
    """Laps of Tunix's DPOTrainer; its W1 script builds model and reference."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama3
    from tunix.sft.dpo import dpo_trainer

    workload = common.WORKLOADS["W1"]
    weights = common.make_params(workload)

    def padded(sequences, length, left):
        ids = np.zeros((len(sequences), length), np.int32)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            place = slice(length - len(sequence), length) if left else slice(len(sequence))
            ids[row, place], mask[row, place] = sequence, 1
        return ids, mask

    def batch(part):
        fields = {}
        for number, (name, length) in enumerate(
            (
                ("prompt", options.prompt),
                ("chosen", options.completion),
                ("rejected", options.completion),
            )
        ):
            sequences = [(row[number] + ([2] if number else []))[:length] for row in part]
            ids, mask = padded(sequences, length, left=number == 0)
            fields |= {f"{name}_ids": ids, f"{name}_mask": mask}
        return dpo_trainer.TrainingInput(**fields)

    number = options.warmup + options.steps
    meter = common.Meter()
    model, reference = (_tunix_model(llama3, nnx, workload, weights, common) for _ in range(2))

    def data():
        for i in range(number + 1):
            if i == 0:
                meter.mark()
            else:
                jax.block_until_ready(nnx.state(trainer.model))
                meter.lap()
            if i == options.warmup:
                common.reset_peak_rss()
                meter.drop()
                meter.mark()
            if i < number:
                yield batch(rows[i * options.batch : (i + 1) * options.batch])

    config = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=10**9, max_steps=number, beta=common.BETA
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        optimizer = optax.adamw(1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
        trainer = dpo_trainer.DPOTrainer(
            model=model, ref_model=reference, training_config=config, optimizer=optimizer
        )
        trainer.train(data())
    return meter


def _tunix_model(llama3, nnx, workload, weights, common):
    width, heads, kv = workload["hidden"], workload["heads"], workload["kv_heads"]
    per = width // heads
    model = llama3.Llama3(
        llama3.ModelConfig(
            num_layers=workload["layers"], vocab_size=workload["vocab"], embed_dim=width,
            hidden_dim=workload["inter"], num_heads=heads, head_dim=per, num_kv_heads=kv,
            rope_theta=10000, norm_eps=common.NORM_EPS, weight_tying=workload["tied"],
        ),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    import jax.numpy as jnp

    model.embedder.input_embedding.value = jnp.asarray(weights["embed"])
    for layer, given in zip(model.layers, weights["layers"]):
        layer.attn.q_proj.w.value = jnp.asarray(given["q"].reshape(width, heads, per))
        layer.attn.k_proj.w.value = jnp.asarray(given["k"].reshape(width, kv, per))
        layer.attn.v_proj.w.value = jnp.asarray(given["v"].reshape(width, kv, per))
        layer.attn.o_proj.w.value = jnp.asarray(given["o"].reshape(heads, per, width))
        layer.mlp.gate_proj.kernel.value = jnp.asarray(given["gate"])
        layer.mlp.up_proj.kernel.value = jnp.asarray(given["up"])
        layer.mlp.down_proj.kernel.value = jnp.asarray(given["down"])
    return model


if __name__ == "__main__":
    sys.exit(main())
