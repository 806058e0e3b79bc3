"""Wrong requests: exit code 2, the key named, a hint; several mistakes together."""

import gzip
import json

import pytest

from alignctl.checks.problems import find_problems
from alignctl.config.compose import compose, read_request
from alignctl.methods.registry import methods
from alignctl.plan.freeze import absolute_paths
from alignctl.plan.plan import make_plan

DPO, SFT_DPO, LOCAL = "recipe=dpo_llama3", "recipe=sft_dpo_llama3", "recipe=dpo_local"
SIMPO, KTO, RM = "recipe=sft_simpo_quickstart", "recipe=sft_kto_quickstart", "recipe=sft_rm_quickstart"
PPO = "recipe=rlhf_quickstart"
TOGETHER, EIGHT = "distributed.parallelism_config", ("distributed=ddp", "launcher.gpus_per_node=8")
SHARES, MATRICES = ("distributed=fsdp2", "launcher.gpus_per_node=8"), f"{TOGETHER}.tp_size=2"
SHARED = (PPO, "peft=lora", "sft.peft.type=none", "ppo.sharing=shared_base")

# Arguments, and what the message must say.
BAD = [
    ([DPO, "dpo.learning_rte=1e-6"], ["`dpo.learning_rte`", "did you mean `dpo.learning_rate`"]),
    ([DPO, "dpo.lr=1e-6"], ["`dpo.lr`", "`dpo.learning_rate`"]),
    ([DPO, "dpo.warmup_ratio=0.1"], ["`dpo.warmup_ratio`", "`dpo.warmup_steps`", "share of all steps"]),
    ([DPO, "dop.beta=0.1"], ["`dop`", "`dpo`"]),
    ([DPO, "model.pth=x"], ["`model.pth`", "`model.path`"]),
    ([DPO, "peft.lora_rank=8"], ["`peft.lora_rank`", "`peft.r`"]),
    ([DPO, "dpo.peft.alpha=8"], ["`dpo.peft.alpha`", "`dpo.peft.lora_alpha`"]),
    ([DPO, "eval.promts=3"], ["`eval.promts`", "`eval.prompts`"]),
    ([DPO, "dpo.data.pth=x"], ["`dpo.data.pth`", "`dpo.data.path`"]),
    ([DPO, "dpo.beta=high"], ["`dpo.beta` must be a number, got `high`"]),
    ([DPO, "dpo.beta=true"], ["`dpo.beta` must be a number"]),
    ([DPO, "dpo.max_length=12.5"], ["`dpo.max_length`", "a whole number or null"]),
    ([DPO, "dpo.bf16=perhaps"], ["`dpo.bf16` must be true or false"]),
    ([DPO, "dpo.loss_type=sigmod"], ["`dpo.loss_type`", "`dpo.loss_type=sigmoid`"]),
    ([DPO, "dpo.loss_type=[sigmoid,hing]"], ["`hing`", "`dpo.loss_type=hinge`"]),
    ([DPO, "dpo.lr_scheduler_type=cosin"], ["`dpo.lr_scheduler_type`", "cosine"]),
    ([DPO, "dpo.optim=adamm"], ["`dpo.optim`", "adamw_torch"]),
    ([DPO, "dpo.f_divergence_type=kl"], ["`dpo.f_divergence_type`", "reverse_kl"]),
    ([DPO, "dpo.run_name=7"], ["`dpo.run_name` must be text", "quote it"]),
    ([DPO, "model.revision=12345e6"], ["`model.revision` must be text", """`'model.revision="12345e6"'`"""]),
    ([DPO, "dpo.run_name=12345e6"], ["`dpo.run_name` must be text", """`'dpo.run_name="..."'`"""]),
    ([DPO, "dpo.optim=galore_adamw"], ["needs the package `galore-torch`", "`dpo.optim_target_modules`"]),
    ([DPO, "dpo.optim=adamw_torch_4bit"], ["needs the package `torchao`"]),
    ([DPO, "dpo.optim=lomo"], ["needs the package `lomo-optim`", "pip install lomo-optim"]),
    ([DPO, "dpo.optim_args=eps"], ["`dpo.optim_args` would have no effect"]),
    ([DPO, "dpo.optim=sgd", "dpo.optim_args=eps"], ["`dpo.optim_args=eps`", "`name=value,name=value`"]),
    ([DPO, "dpo.optim_target_modules=all-linear"], ["`dpo.optim_target_modules` would have no effect"]),
    ([DPO, "dpo.adam_beta1=1.5"], ["`dpo.adam_beta1` must be from 0 to below 1, got `1.5`"]),
    ([DPO, "dpo.weight_decay=-1"], ["`dpo.weight_decay` must be at least 0"]),
    ([DPO, "dpo.dataloader_num_workers=-1"], ["`dpo.dataloader_num_workers` must be at least 0"]),
    ([DPO, "dpo.dataloader_prefetch_factor=2"], ["would have no effect", "`dpo.dataloader_num_workers=2`"]),
    ([DPO, "dpo.ddp_backend=gloo"], ["`dpo.ddp_backend` would have no effect"]),
    ([DPO, "dpo.ddp_backend=glo"], ["`dpo.ddp_backend` has no value `glo`", "`dpo.ddp_backend=gloo`"]),
    (
        [DPO, "dpo.accelerator_config={split_batches: true}"],
        ["`split_batches=true`", "`dpo.per_device_train_batch_size`"],
    ),
    (
        [DPO, "dpo.accelerator_config={dispatch_batches: true}"],
        ["`dispatch_batches=true`", "each process reads its own"],
    ),
    (
        [DPO, "dpo.accelerator_config={even_batches: false}"],
        ["`even_batches=false`", "`dpo.dataloader_drop_last=true`"],
    ),
    (
        [DPO, "dpo.accelerator_config={gradient_accumulation_kwargs: {num_steps: 4}}"],
        ["`num_steps=4`", "`dpo.gradient_accumulation_steps`"],
    ),
    ([DPO, "dpo.accelerator_config=gone.json"], ["`dpo.accelerator_config=gone.json` cannot be read"]),
    ([DPO, "dpo.truncation_mode=keep_stat"], ["`dpo.truncation_mode=keep_start`"]),
    ([KTO, "kto.loss_type=kot"], ["`kto.loss_type` has no value `kot`", "`kto.loss_type=kto`"]),
    ([SFT_DPO, "sft.packing_strategy=bdf"], ["`sft.packing_strategy=bfd`"]),
    ([SFT_DPO, "sft.padding_free=true"], ["does not keep to `sft.max_length`"]),
    ([DPO, "dpo.lr_scheduler_type=cosine_with_min_lr"], ["needs `dpo.lr_scheduler_kwargs.min_lr_rate`"]),
    ([DPO, "dpo.lr_scheduler_type=warmup_stable_decay"], ["needs `dpo.lr_scheduler_kwargs.num_decay_steps`"]),
    (
        [DPO, "dpo.lr_scheduler_type=cosine", "dpo.lr_scheduler_kwargs={num_cycle: 1}"],
        ["has no `dpo.lr_scheduler_kwargs.num_cycle`", "`dpo.lr_scheduler_kwargs.num_cycles`"],
    ),
    (
        [DPO, "dpo.lr_scheduler_type=warmup_stable_decay", "dpo.lr_scheduler_kwargs={num_decay_steps: 50}"]
        + ["dpo.max_steps=2"],
        ["`dpo.lr_scheduler_kwargs.num_decay_steps=50` takes the whole training", "2 optimizer steps"],
    ),
    (
        [DPO, "dpo.use_weighting=true", "dpo.loss_type=[sigmoid,sft]"],
        ["`dpo.use_weighting` and the loss `sft` exclude each other"],
    ),
    ([DPO, "dpo.save_strategy=best"], ["needs to know what is best", "`dpo.metric_for_best_model=loss`"]),
    ([DPO, "model.add_tokens=['']"], ["`model.add_tokens` has a token without a character"]),
    ([DPO, "dpo.lr_scheduler_kwargs=x"], ["`dpo.lr_scheduler_kwargs` must be a mapping"]),
    ([DPO, "dpo.lr_scheduler_type=reduce_lr_on_plateau"], ["needs evaluations to go by"]),
    (
        [DPO, "dpo.load_best_model_at_end=true", "dpo.eval_strategy=epoch", "dpo.save_strategy=steps"],
        ["`dpo.eval_strategy=epoch` and `dpo.save_strategy=steps` have to be the same"],
    ),
    (
        [
            DPO,
            "dpo.load_best_model_at_end=true",
            "dpo.eval_strategy=steps",
            "dpo.save_strategy=steps",
            "dpo.eval_steps=3",
            "dpo.save_steps=4",
        ],
        ["`dpo.save_steps=4` is no multiple of `dpo.eval_steps=3`", "`dpo.save_steps=3`"],
    ),
    ([DPO, "dpo.use_liger_kernel=true"], ["needs the package `liger-kernel`"]),
    ([DPO, "dpo.compile=fast"], ["`dpo.compile` must be one of auto, on, off or"]),
    ([DPO, "dpo.compile=auto", "dpo.torch_compile=true"], ["`dpo.compile` and `dpo.torch_compile` exclude each"]),
    ([DPO, "dpo.compile=on", "distributed=zero3"], ["`dpo.compile=on` and `distributed=zero3` exclude each"]),
    ([DPO, "dpo.compile=on", "dpo.torch_compile_backend=eager"], ["and `dpo.torch_compile_backend` exclude each"]),
    ([DPO, "dpo.torch_compile_mode=fast"], ["`dpo.torch_compile_mode` has no value `fast`"]),
    (
        [DPO, "dpo.gradient_checkpointing_kwargs={use_reentrent: false}"],
        ["activation_checkpointing_kwargs` has no `use_r", "use_reentrant"],
    ),
    ([DPO, "dpo.pass_tokens=0.5"], ["`dpo.pass_tokens` must be a whole number or auto, got `0.5`"]),
    ([DPO, "peft=qlora", "dpo.compile=on"], ["`dpo.compile=on` and `peft=qlora` exclude each other"]),
    ([DPO, "dpo.activation_checkpointing_kwargs={every_n_layers: 2}"], ["has no `every_n_layers`"]),
    (
        [DPO, "dpo.pass_tokens=64", "dpo.loss_type=aot"],
        ["`dpo.pass_tokens` would have no effect: the loss aot sorts the pairs"],
    ),
    ([DPO, "dpo.parallelism_config={tp_size: 2}"], ["`dpo.parallelism_config` is not a stage's to set"]),
    ([DPO, f"{TOGETHER}.sp_size=2"], ["needs several processes, and `distributed` is none"]),
    ([DPO, *EIGHT, f"{TOGETHER}.sp_size=3"], ["sp_size=3` does not divide the 8 processes of a machine"]),
    ([DPO, *EIGHT, f"{TOGETHER}.sp_size=half"], ["sp_size` must be a whole number of at least 1, got `half`"]),
    ([DPO, *EIGHT, f"{TOGETHER}.cp_size=2"], ["cp_size` is not to be set", "its ring", "set `sp_size`"]),
    ([DPO, *EIGHT, f"{TOGETHER}.sp_sise=2"], ["unknown key", "sp_size`"]),
    ([DPO, *EIGHT, f"{TOGETHER}.sp_size=2", "dpo.engine=padded"], ["`dpo.engine=padded` exclude each other"]),
    ([DPO, *EIGHT, f"{TOGETHER}.sp_size=2", "dpo.neftune_noise_alpha=5"], ["padded rows", "neftune_noise_alpha=null"]),
    ([DPO, *EIGHT, f"{TOGETHER}.sp_size=2", "dpo.loss_type=aot"], ["exclude each other: the loss aot sorts"]),
    ([PPO, *EIGHT, f"{TOGETHER}.sp_size=2"], ["cannot be with the method `ppo`", "`dpo`, `sft`"]),
    (
        ["recipe=quickstart", "stages=[sft]", "distributed=ddp", "launcher.processes=6", f"{TOGETHER}.sp_size=3"],
        ["`distributed.parallelism_config.sp_size=3` does not divide the heads", "num_attention_heads"],
    ),
    ([DPO, *EIGHT, MATRICES], ["tp_size=2` divides what FSDP2", "`distributed` is ddp", "`distributed=fsdp2`"]),
    ([DPO, MATRICES], ["tp_size=2` divides what FSDP2", "`distributed` is none"]),
    ([DPO, *SHARES, f"{TOGETHER}.tp_size=3"], ["tp_size=3` does not divide the 8 processes of a machine"]),
    ([DPO, *SHARES, f"{TOGETHER}.tp_size=0"], ["tp_size` must be a whole number of at least 1, got `0`"]),
    ([DPO, *SHARES, MATRICES, f"{TOGETHER}.sp_size=2"], ["sp_size` and", "tp_size` exclude each other"]),
    ([DPO, *SHARES, MATRICES, "peft=lora"], ["`peft.type=lora` of `dpo` exclude each other"]),
    ([DPO, *SHARES, MATRICES, "dpo.precompute_ref_log_probs=true"], ["precompute_ref_log_probs=false`"]),
    ([DPO, *SHARES, MATRICES, "dpo.neftune_noise_alpha=5"], ["the noise would differ", "neftune_noise_alpha=null`"]),
    ([DPO, *SHARES, MATRICES, "dpo.loss_type=aot"], ["exclude each other: the loss aot sorts"]),
    ([KTO, *SHARES, MATRICES, "stages=[kto]"], ["cannot be with the method `kto`", "`dpo`, `sft`"]),
    (
        ["recipe=quickstart", "stages=[sft]", "distributed=fsdp2", "launcher.processes=6", f"{TOGETHER}.tp_size=3"],
        ["`distributed.parallelism_config.tp_size=3` does not divide the heads", "num_attention_heads"],
    ),
    ([DPO, "model.attn_implementation=flash_attention_2"], ["needs the package `flash-attn`"]),
    ([DPO, "model.attn_implementation=owner/kernel"], ["needs the package `kernels`"]),
    ([DPO, "model.attn_implementation=spda"], ["`model.attn_implementation=sdpa`"]),
    ([DPO, "dpo.ref_model_sync_steps=0"], ["`dpo.ref_model_sync_steps` must be at least 1"]),
    ([DPO, "seed=one"], ["`seed` must be a whole number"]),
    ([DPO, "stages=dpo"], ["`stages` must be a list"]),
    ([DPO, "stages=[]"], ["`stages` is empty", "dpo"]),
    ([DPO, "stages=[dpo,rm]"], ["`rm`", "not a stage"]),
    ([DPO, "stages=[dpo,dpo]"], ["`dpo` twice"]),
    ([DPO, "dpo.method=dpp"], ["`dpo.method=dpp`", "`dpo.method=dpo`"]),
    ([SFT_DPO, "stages=[dpo,sft]"], ["`sft` runs after `dpo`", "put `sft` first"]),
    ([SFT_DPO, "stages=[dpo]"], ["`sft` is not in `stages`", "`dpo.from=null`"]),
    ([SFT_DPO, "dpo.from=stf"], ["`stf`", "`dpo.from=sft`"]),
    ([SFT_DPO, "dpo.from=dpo"], ["cannot start from itself"]),
    ([DPO, "model=llama"], ["unknown model `llama`", "`model=llama3_8b`"]),
    ([DPO, "tracker=wand"], ["unknown tracker `wand`", "`tracker=wandb`"]),
    ([DPO, "data=capybara"], ["`data` is not a group of this recipe", "`data@dpo.data=...`"]),
    ([DPO, "data@sft.data=capybara"], ["`data@sft.data` is not a group"]),
    ([DPO, "modell@x=llama3_8b"], ["unknown group `modell`"]),
    ([DPO, "dpo.beta=0.1,0.2"], ["several values", "--multirun"]),
    ([DPO, "dpo.beta"], ["`dpo.beta` is not an override", "key=value"]),
    (["mine.yaml", "ppo.kl_coef=1"], ["`mine.yaml` is not an override", "`recipe=./mine.yaml`"]),
    ([DPO, "/home/me/mine.yaml"], ["`recipe=/home/me/mine.yaml`"]),
    ([DPO, "dpo.loss_type=[a,b"], ["cannot read the override"]),
    ([DPO, "dpo.output_dir=/x"], ["`dpo.output_dir` is not a stage's to set", "`run_dir`"]),
    ([DPO, "dpo.push_to_hub=true"], ["`dpo.push_to_hub`"]),
    ([DPO, "dpo.report_to=wandb"], ["`dpo.report_to`", "`tracker=wandb`"]),
    ([DPO, "dpo.project=mine"], ["`dpo.project`", "`tracker.project`"]),
    ([DPO, "dpo.padding_free=true"], ["`dpo.padding_free`"]),
    ([DPO, "dpo.disable_dropout=true"], ["`peft.lora_dropout=0.05` would have no effect"]),
    ([DPO, "~dpo.disable_dropout"], ["`peft.lora_dropout=0.05` would have no effect"]),
    ([DPO, "dpo.fp16=true"], ["`dpo.bf16` and `dpo.fp16` exclude each other"]),
    ([DPO, "dpo.load_best_model_at_end=true"], ["`dpo.load_best_model_at_end`", "eval_strategy"]),
    (
        [DPO, "dpo.global_batch_size=9"],
        ["`dpo.global_batch_size=9` is no multiple of 2", "`dpo.global_batch_size=8`", "`dpo.global_batch_size=10`"]
        + ["`dpo.per_device_train_batch_size=1`"],
    ),
    (
        [DPO, "global_batch_size=36", "dpo.per_device_train_batch_size=8", *EIGHT],
        ["no multiple of 64, what the 8 processes of `dpo` take at once", "set `global_batch_size=64`"],
    ),
    (
        [DPO, "dpo.global_batch_size=64", "dpo.gradient_accumulation_steps=4"],
        ["`dpo.gradient_accumulation_steps=4` contradict each other", "makes it 32"],
    ),
    ([DPO, "global_batch_size=64", "dpo.global_batch_size=16"], ["`global_batch_size=64` would have no effect"]),
    ([DPO, "dpo.global_batch_size=16", "dpo.auto_find_batch_size=true"], ["exclude each other", "`dpo.pass_tokens`"]),
    ([DPO, "dpo.global_batch_size=0"], ["`dpo.global_batch_size` must be at least 1"]),
    ([DPO, "global_batch_size=many"], ["`global_batch_size` must be a whole number"]),
    ([KTO, "kto.global_batch_size=1", "kto.per_device_train_batch_size=1"], ["a global batch of 2 or more"]),
    ([PPO, "ppo.global_batch_size=7", *EIGHT], ["no multiple of 8, the number of processes of `ppo`"]),
    (
        [PPO, "ppo.global_batch_size=64", "ppo.per_device_train_batch_size=32"],
        ["`ppo.per_device_train_batch_size=32` contradict each other", "makes it 64"],
    ),
    (
        ["recipe=grpo_quickstart", "grpo.global_batch_size=20"],
        ["`grpo.num_generations` is 8", "`grpo.global_batch_size=16`, or `grpo.global_batch_size=24`"],
    ),
    ([DPO, "dpo.early_stopping_patience=3"], ["counts evaluations, and there are none", "eval_strategy"]),
    ([DPO, "dpo.early_stopping_patience=0"], ["`dpo.early_stopping_patience` must be at least 1"]),
    ([DPO, "dpo.early_stopping_threshold=0.1"], ["would have no effect", "`dpo.early_stopping_patience`"]),
    ([DPO, "dpo.optim=schedule_free_adamw", "distributed=zero2"], ["averages weights", "`distributed=zero2`"]),
    ([DPO, "dpo.sync_ref_model=true", "peft=none", "distributed=fsdp2"], ["`dpo.sync_ref_model`", "zero3"]),
    ([DPO, "dpo.engine=shared_prefix", "dpo.neftune_noise_alpha=5"], ["exclude each other", "`dpo.engine=auto`"]),
    ([PPO, "ppo.early_stopping_patience=3"], ["`ppo.early_stopping_patience`", "no evaluations"]),
    ([DPO, "dpo.max_steps=2", "dpo.warmup_steps=100"], ["`dpo.warmup_steps=100`", "2 optimizer steps"]),
    ([DPO, "dpo.loss_weights=[1,2]"], ["`dpo.loss_weights` has 2 values for 1"]),
    ([DPO, "dpo.beta=-1"], ["`dpo.beta` must be greater than 0"]),
    ([DPO, "eval.temperature=0"], ["`eval.temperature` must be greater than 0"]),
    ([DPO, "eval.judge=gpt"], ["`eval.judge=gpt`", "quickstart"]),
    ([DPO, "peft.type=lorra"], ["`peft.type=lorra`", "`peft.type=lora`"]),
    ([DPO, "peft=none", "peft.r=8"], ["`peft.r` would have no effect"]),
    ([DPO, "data.path=x/y"], ["`data.path` would have no effect", "`dpo.data.path=...`"]),
    ([DPO, "dpo.data.format=hh"], ["`dpo.data.format=hh`", "`dpo.data.format=hh_rlhf`"]),
    ([DPO, "model.path=null"], ["no model to start from"]),
    ([DPO, "model.chat_template=nowhere.jinja"], ["`model.chat_template=nowhere.jinja`"]),
    ([DPO, "model.chat_template=chatlm"], ["no such template or file", "did you mean `model.chat_template=chatml`?"]),
    ([LOCAL], ["`model.path` must be given", "`data.path` must be given"]),
    ([LOCAL, "model.path=./nowhere", "data.path=x/y"], ["`model.path=./nowhere`", "no such folder"]),
    ([LOCAL, "model.path=a/b", "data.path=nowhere.jsonl"], ["`data.path=nowhere.jsonl`", "no such file"]),
    ([LOCAL, "model.path=a/b", "data.path=x/y", "data.eval_path=no.csv"], ["`data.eval_path=no.csv`"]),
    ([LOCAL, "model.path=a/b", "data.path=builtin:qs"], ["`data.path=builtin:qs`", "builtin:quickstart"]),
    (["recipe=dpo_lama3"], ["unknown recipe `dpo_lama3`", "`recipe=dpo_llama3`"]),
    (["recipe=nowhere/mine.yaml"], ["nowhere/mine.yaml", "no such file"]),
    ([DPO, "recipe=quickstart"], ["`recipe` is given 2 times"]),
    (["recipe=mine.yml"], ["`recipe=mine.yml`", "mine.yaml"]),
    (["quickstart"], ["`quickstart` is not an override", "write `recipe=quickstart`"]),
    ([DPO, "dpo.data.path=~/p(1).csv"], ["cannot read the override", """'dpo.data.path="~/p(1).csv"'"""]),
    ([LOCAL, "model.path=a/b", "data.path=x/y", "data.eval_rows=1.5"], ["`data.eval_rows=1.5` must be a whole", "=2`"]),
    ([LOCAL, "model.path=a/b", "data.path=a.csv", "data.split=a"], ["`data.split=a` would have", "name its file"]),
    (
        [LOCAL, "model.path=a/b", "data.path=[a.jsonl, b.jsonl]", "data.revision=main", "data.eval_path=x/y.jsonl"],
        ["`data.revision=main` would have no effect: a.jsonl, b.jsonl is no", "set `data.revision=null`"],
    ),
    ([LOCAL, "model.path=a/b", "data.path=https://h/a.csv", "data.name=en"], ["`data.name=en` would have no effect"]),
    (
        [LOCAL, "model.path=a/b", "data.mix=[{path: x/y}, {path: a.jsonl, split: test}]"],
        ["`data.mix[1].split=test` would have no effect"],
    ),
    (
        [LOCAL, "model.path=a/b", "data.mix=[{path: x/y, name: en}, {path: a.csv}]", "data.name=de"],
        ["`data.name=de` would have no effect: a.csv is no"],
    ),
    ([LOCAL, "model.path=a/b", "data.mix=[]"], ["`data.mix` is empty"]),
    ([LOCAL, "model.path=a/b", "data.mix_by=tokens", "data.path=x/y"], ["`data.mix_by` would have no effect"]),
    ([LOCAL, "model.path=a/b", "data.path=x/y", "data.mix=[{path: a/b}]"], ["exclude each other", "`data.path=null`"]),
    ([LOCAL, "model.path=a/b", "data.mix=[{path: a/b, wieght: 1}]"], ["`data.mix[0].wieght`", "`weight`"]),
    ([LOCAL, "model.path=a/b", "data.mix=[{weight: 0}]"], ["no `path`", "`data.mix[0].weight` must be greater than 0"]),
    ([LOCAL, "model.path=a/b", "data.mix=[{path: x/y, weight: 1}, {path: x/z}]"], ["`data.mix[1]` has no `weight`"]),
    ([LOCAL, "model.path=a/b", "data.mix=[{path: no.jsonl}]"], ["`data.mix[0].path=no.jsonl`", "no such file"]),
    ([LOCAL, "model.path=a/b", "data.mix=[{path: x/y, format: hh}]"], ["`data.mix[0].format=hh`", "hh_rlhf"]),
    (["recipe=quickstart", "data.path=null", "data.mix=[{path: x/y}]", "data.mix_by=tokens"], ["needs a tokenizer"]),
    (
        [LOCAL, "model.path=a/b", "data.path=s3://b/rows.jsonl"],
        ["`s3://` needs the package `s3fs`", "pip install s3fs"],
    ),
    (
        [LOCAL, "model.path=a/b", "data.path=x/y", 'data.split="train[:90%]"', "data.eval_split=train"],
        ["`data.eval_split=train` has rows of `data.split=train[:90%]`", """'data.eval_split="train[90%:]"'"""],
    ),
    ([LOCAL, "model.path=a/b", "data.path=x/y", "data.eval={a: no.jsonl}"], ["`data.eval.a=no.jsonl`", "no such file"]),
    ([LOCAL, "model.path=a/b", "data.path=x/y", "data.eval={a-b: x/z}"], ["`a-b` cannot be the name of a set"]),
    ([LOCAL, "model.path=a/b", "data.path=x/y", "data.eval={a: x/z}", "data.eval_rows=3"], ["exclude each other"]),
    ([LOCAL, "model.path=a/b", "data.path=http://h/rows.doc"], ["cannot read `.doc`"]),
    ([LOCAL, "model.path=a/b", "data.path=htp://h/rows.jsonl"], ["no way to read from `htp://`"]),
    ([LOCAL, "model.path=a/b", "data.path=https://me:key@h/a.csv"], ["a password in it"]),
    (["recipe=quickstart", "data.eval_rows=32"], ["`data.eval_rows` would have no effect"]),
    (
        [LOCAL, "model.path=a/b", "data.path=x/y", "data.eval_path=x/y"],
        ["`data.eval_path` is the file that is trained"],
    ),
    # values of a kind nobody expects
    ([DPO, "model=null"], ["unknown model `None`", "`model=llama3_8b`"]),
    ([DPO, "tracker=5"], ["unknown tracker `5`"]),
    ([DPO, "model=[a]"], ["unknown model `['a']`"]),
    ([DPO, "dpo.data=capybara"], ["`dpo.data` must be a mapping", "`data@dpo.data=capybara`"]),
    ([DPO, "dpo.peft=5"], ["`dpo.peft` must be a mapping"]),
    ([DPO, "dpo.eval=5"], ["`dpo.eval` must be a mapping"]),
    ([DPO, "stages=[[dpo]]"], ["`stages` must be a list of texts"]),
    ([DPO, "stages=[1]"], ["`stages` must be a list of texts"]),
    ([DPO, "dpo.method=[dpo]"], ["`dpo.method=['dpo']`"]),
    ([DPO, "peft.type=[lora]"], ["`peft.type=['lora']`"]),
    ([DPO, "tracker.report_to=[wand]"], ["unknown `tracker.report_to=wand`", "`tracker.report_to=wandb`"]),
    ([DPO, "tracker.report_to=[1]"], ["`tracker.report_to` must be text or a list of texts"]),
    ([DPO, "tracker.report_to={wandb: 1}"], ["`tracker.report_to` must be text or a list of texts"]),
    ([DPO, "tracker.report_to=[dvclive, dvclive]"], ["`tracker.report_to` names `dvclive` 2 times"]),
    ([DPO, "tracker.report_to=[none, dvclive]"], ["names `none` beside others", "`tracker.report_to=[dvclive]`"]),
    ([DPO, "tracker.tags=mine"], ["`tracker.tags` must be a list"]),
    ([DPO, "tracker.report_to=nonsense"], ["`tracker.report_to=nonsense`"]),
    ([DPO, "eval.judge=[x]"], ["`eval.judge` must be text"]),
    ([DPO, "peft.target_modules=5"], ["a list of texts or text or null"]),
    (["recipe=quickstart", "model.scratch.config=5"], ["`model.scratch.config` must be a mapping"]),
    (["recipe=quickstart", "model.scratch.vocab_size=big"], ["`model.scratch.vocab_size` must be a whole number"]),
    (["recipe=quickstart", "model.scratch.confg=1"], ["`model.scratch.confg`", "`model.scratch.config`"]),
    # out of range
    ([DPO, "log_every=0"], ["`log_every` must be at least 1"]),
    ([DPO, "seed=-1"], ["`seed` must be from 0 to 4294967295"]),
    ([DPO, "dpo.data.limit=0"], ["`dpo.data.limit` must be at least 1"]),
    ([DPO, "eval.batch_size=0"], ["`eval.batch_size` must be at least 1"]),
    ([DPO, "dpo.beta=nan"], ["`dpo.beta` must be a finite number"]),
    ([DPO, "dpo.num_train_epochs=-1"], ["`dpo.num_train_epochs` must be greater than 0"]),
    # one owner per number
    ([DPO, "dpo.seed=5"], ["`dpo.seed`", "`seed` of the run"]),
    ([DPO, "dpo.per_device_eval_batch_size=5"], ["`eval.batch_size`"]),
    # no effect
    (["recipe=quickstart", "dpo.model.path=foo/bar"], ["`dpo.model.path` would have no effect", "`dpo.from=null`"]),
    (["recipe=quickstart", "dpo.model.chat_template=no.jinja"], ["`model.chat_template=no.jinja`"]),
    ([DPO, "model.tokenizer=./nope"], ["`model.tokenizer=./nope`"]),
    ([DPO, "eval=quickstart"], ["can only judge prompts of `builtin:quickstart`"]),
    (["recipe=quickstart", "dpo.max_length=1000"], ["`dpo.max_length=1000`", "256 tokens"]),
    # methods and roles
    ([DPO, "dpo.loss_type=exo_pair"], ["`exo_pair` needs `dpo.label_smoothing`", "`dpo.label_smoothing=0.001`"]),
    ([DPO, "dpo.loss_type=robust", "dpo.label_smoothing=0.5"], ["`dpo.label_smoothing` must be from 0 to below 0.5"]),
    ([DPO, "dpo.label_smoothing=0.1"], ["`dpo.label_smoothing` would have no effect", "`dpo.loss_type=robust`"]),
    ([SIMPO, "simpo.label_smoothing=2"], ["`simpo.label_smoothing` must be from 0"]),
    ([DPO, "dpo.loss_type=aot", "dpo.use_weighting=true"], ["`dpo.use_weighting` and the loss `aot`"]),
    ([DPO, "dpo.loss_type=nca_pair", "dpo.f_divergence_type=forward_kl"], ["not defined for the loss nca_pair"]),
    ([DPO, "dpo.sync_ref_model=true"], ["`dpo.sync_ref_model` needs a reference of its own"]),
    (
        [DPO, "peft=none", "dpo.sync_ref_model=true", "dpo.precompute_ref_log_probs=true"],
        ["`dpo.sync_ref_model` and `dpo.precompute_ref_log_probs` exclude each other"],
    ),
    ([DPO, "dpo.gamma_beta_ratio=0.5"], ["unknown key `dpo.gamma_beta_ratio`"]),
    ([DPO, "peft.target_modules=[q_proj,lm_head]"], ["`peft.target_modules` names `lm_head`"]),
    ([DPO, "dpo.optim=paged_adamw_8bitt"], ["`dpo.optim`"]),
    ([DPO, "dpo.data.max_lost=-1"], ["`dpo.data.max_lost` must be from 0 to 1, got `-1`"]),
    ([DPO, "dpo.data.max_too_long=-1"], ["`dpo.data.max_lost` must be from 0 to 1"]),
    ([DPO, "data.max_truncated=-0.1"], ["`data.max_truncated` must be from 0 to 1"]),
    ([DPO, "dpo.data.max_lost=5"], ["`dpo.data.max_lost` must be from 0 to 1", "0.05 is 5 %"]),
    (
        [DPO, "dpo.data.max_too_long=1", "dpo.data.max_lost=1"],
        ["`dpo.data.max_too_long` is the former name of", "take"],
    ),
    ([DPO, "dpo.data.margin=5"], ["`dpo.data.margin` must be"]),
    ([DPO, "dpo.data.margin=score"], ["`data.margin` would have no effect on `dpo`", "`reward`"]),
    ([SIMPO, "simpo.loss_type=sigmoid"], ["`simpo.loss_type` is not a stage's to set", "use the method `dpo`"]),
    ([SIMPO, "simpo.precompute_ref_log_probs=true"], ["`simpo.precompute_ref_log_probs`", "no reference"]),
    ([SIMPO, "simpo.reference=sft"], ["`simpo.reference` would have no effect", "simpo has no reference"]),
    ([SIMPO, "simpo.simpo_gamma=1.6"], ["`simpo.simpo_gamma`", "`simpo.gamma_beta_ratio`", "gamma divided by beta"]),
    ([SIMPO, "simpo.gamma_beta_ratio=-1"], ["`simpo.gamma_beta_ratio` must be at least 0"]),
    (["recipe=orpo_quickstart", "orpo.label_smoothing=0.1"], ["`orpo.label_smoothing` is not a stage's to set"]),
    (["recipe=sft_ipo_quickstart", "ipo.normalize=length"], ["`ipo.normalize` must be one of tokens, none"]),
    ([KTO, "kto.per_device_train_batch_size=1"], ["needs 2 or more", "`kto.per_device_train_batch_size=2`"]),
    (["recipe=dpo_llama3", "dpo.engine=fast"], ["`dpo.engine` must be one of auto, shared_prefix, padded"]),
    (
        ["recipe=dpo_llama3", "dpo.engine=shared_prefix", "model=gemma"],
        ["`dpo.engine=shared_prefix` and `model.attn_implementation=eager` exclude each other"],
    ),
    ([PPO, "ppo.reward_model=null"], ["`ppo` needs something that scores", "`ppo.reward_funcs=[module:function]`"]),
    ([PPO, "ppo.reward_funcs=[judge]"], ["`judge` is no `module:function`"]),
    ([PPO, "ppo.reward_funcs=[no/such.py:f]"], ["there is no file no/such.py"]),
    ([PPO, "ppo.reward_funcs=[a:f,b:f]"], ["each function is logged under its name", "got f, f"]),
    ([PPO, "ppo.reward_funcs=[exact_mach]"], ["no ready function", "did you mean `exact_match`?"]),
    ([PPO, "ppo.reward_funcs=[format]"], ["`ppo.reward_funcs: format` needs `format`", "`{format: ...}`"]),
    ([PPO, "ppo.reward_funcs=[{format: '('}]"], ["`(` is no regular expression"]),
    ([PPO, "ppo.reward_funcs=[{repetition: 3, url: 'http://a'}]"], ["`repetition` and `url` are two entries"]),
    ([PPO, "ppo.reward_funcs=[{model: a}]"], ["nothing says what", "one of its keys is `function`, `url`, `judge`"]),
    ([PPO, "ppo.reward_funcs=[{numeric: answer, tolerence: 1}]"], ["unknown key `tolerence`", "`tolerance`"]),
    ([PPO, "ppo.reward_funcs=[{numeric: answer, tolerance: a}]"], ["numeric.tolerance` must be a number, got `a`"]),
    ([PPO, "ppo.reward_funcs=[{judge: 'http://a/v1'}]"], ["needs `model`", "`{judge: ..., model: ...}`"]),
    ([PPO, "ppo.reward_funcs=[{judge: a, model: b}]"], ["`a` is no URL of a server"]),
    ([PPO, "ppo.reward_funcs=[{length_penalty: 10, buffer: 20}]"], ["from 1 to as many tokens, got `20`"]),
    ([PPO, "ppo.reward_funcs=['http://u:p@a/b']"], ["a password or a key in the URL of a", "`key_from: MY_KEY`"]),
    ([PPO, "ppo.reward_funcs=['http://u@a/b']"], ["a password or a key in the URL of a"]),
    ([PPO, "ppo.reward_funcs=['http://a/b?api_key=c']"], ["a password or a key in the URL of a"]),
    ([PPO, "ppo.reward_funcs=[{url: 'http://a', name: hf_" + "aB3" * 8 + "}]"], ["holds what looks like a token"]),
    (
        [PPO, "ppo.reward_funcs=[{judge: 'http://a/v1', model: b, parallel: 0, max_tokens: 0, temperature: -1}]"],
        ["judge.parallel` must be at least 1", "judge.max_tokens` must be at least 1", "judge.temperature` must be at"],
    ),
    ([PPO, "ppo.reward_funcs=[{numeric: answer, tolerance: -1}]"], ["numeric.tolerance` must be at least 0"]),
    ([PPO, "ppo.reward_funcs=[{judge: 'http://a/v1', model: b, question: 'a {'}]"], ["cannot be filled in", "`{{`"]),
    ([PPO, "ppo.reward_funcs=[{url: 'http://a', key_from: NO_KEY}]"], ["has no key in the variable `NO_KEY`"]),
    ([PPO, "ppo.reward_funcs=['http://a/b','http://c/b']"], ["each function is logged under its name", "got b, b"]),
    ([PPO, "ppo.reward_funcs=[3]"], ["`ppo.reward_funcs` must be a list of texts or mappings"]),
    ([PPO, "ppo.reward_workers=2"], ["`ppo.reward_workers` would have no effect"]),
    ([PPO, "ppo.reward_funcs=[exact_match]", "ppo.reward_retries=2"], ["would have no effect: no server or judge"]),
    (
        [PPO, "ppo.reward_funcs=['http://a/b']", "ppo.reward_timeout=600"],
        ["let a server take 3631 s, and after `launcher.stall_timeout=1800` s", "`launcher.stall_timeout=7262`"],
    ),
    ([PPO, "ppo.reward_funcs=['http://[a']"], ["`http://[a` is no URL of a server"]),
    ([PPO, "ppo.reward_timeout=0"], ["`ppo.reward_timeout` must be greater than 0"]),
    ([PPO, "ppo.reward_weights=[1,2]"], ["`ppo.reward_weights` has 2 values for 1 sources"]),
    ([PPO, "ppo.target_kl=0"], ["`ppo.target_kl` must be greater than 0"]),
    ([PPO, "ppo.dual_clip=1"], ["`ppo.dual_clip` must be greater than 1", "3 is its paper's"]),
    ([PPO, "ppo.gamma=1.01"], ["`ppo.gamma` must be from 0 to 1, got `1.01`"]),
    ([PPO, "ppo.lam=-0.5"], ["`ppo.lam` must be from 0 to 1"]),
    ([PPO, "ppo.kl_coef=-1"], ["`ppo.kl_coef` must be at least 0"]),
    ([PPO, "ppo.entropy_coef=-1"], ["`ppo.entropy_coef` must be at least 0"]),
    ([PPO, "ppo.vf_coef=-1"], ["`ppo.vf_coef` must be at least 0"]),
    ([PPO, "ppo.value_warmup_steps=-1"], ["`ppo.value_warmup_steps` must be at least 0"]),
    ([PPO, "ppo.temperature=0"], ["`ppo.temperature` must be greater than 0"]),
    ([PPO, "ppo.generation=vllm"], ["`ppo.generation=vllm` needs the package `vllm`", 'pip install "alignctl[vllm]"']),
    ([PPO, "ppo.vllm_server_port=9000"], ["`ppo.vllm_server_port` would have no effect", "`ppo.generation=vllm`"]),
    (
        [PPO, "ppo.generation=vllm", "ppo.vllm_mode=server", "ppo.vllm_gpu_memory_utilization=0.5"],
        ["`ppo.vllm_gpu_memory_utilization` would have no effect", "`ppo.vllm_mode=colocate`"],
    ),
    ([PPO, "ppo.generation=fast"], ["`ppo.generation` must be one of auto, transformers, continuous, vllm"]),
    ([PPO, "ppo.kl_estimator=k4"], ["`ppo.kl_estimator` must be one of k1, k2, k3"]),
    ([PPO, "ppo.reward_model=sft"], ["`ppo.reward_model=sft`"]),
    ([PPO, "ppo.gradient_accumulation_steps=2"], ["is not a stage's to set", "set `pass_tokens`"]),
    ([PPO, "ppo.sharing=shared_base"], ["needs an adapter", "`peft=lora`", "`rm` trains all weights"]),
    (
        [*SHARED, "rm.peft.type=none"],
        ["needs a reward model that is an adapter, but `rm` trains all", "`rm.peft.type=lora`"],
    ),
    ([*SHARED, "rm.from=null"], ["`ppo` starts from `sft` and `rm` from `model`", "`rm.from=sft`"]),
    ([*SHARED, "rm.from=null", "ppo.from=null", "stages=[rm,ppo]"], ["start from random weights of their own"]),
    (
        [*SHARED, "rm.from=null", "ppo.from=null", "stages=[rm,ppo]", "model=smollm", "rm.model.path=a/b"],
        ["`ppo.model.path` and `rm.model.path` differ"],
    ),
    ([*SHARED, "ppo.reward_model=conf/model"], ["holds no adapter", "the folder `adapter/` of a reward stage"]),
    ([*SHARED, "ppo.reward_model=./none"], ["there is no such folder"]),
    ([*SHARED, "ppo.gradient_checkpointing_kwargs={use_reentrant:true}"], ["take `use_reentrant` out"]),
    ([*SHARED, "peft.bias=all"], ["`peft.bias=all` exclude each other"]),
    ([*SHARED, "peft.init_lora_weights=pissa"], ["`peft.init_lora_weights=pissa` exclude each other"]),
    ([KTO, "kto.train_sampling_strategy=random"], ["`kto.train_sampling_strategy` is not a stage's to set"]),
    ([KTO, "kto.desirable_weight=0"], ["`kto.desirable_weight` must be greater than 0"]),
    ([KTO, "kto.reference=stf"], ["`kto.reference=stf`", "no such folder"]),
    ([KTO, "kto.reference=kto"], ["a stage cannot start from itself"]),
    ([KTO, "kto.reward_model=sft"], ["`kto.reward_model` would have no effect"]),
    ([RM, "reward.max_steps=3"], ["unknown key `reward`", "the stage with the method `reward` is called `rm`"]),
    ([SFT_DPO, "data@dpo.data=capybara"], ["these rows are demonstrations", "`dpo` needs preferences"]),
    ([DPO, "data@dpo.data=kto_mix"], ["`dpo.data.holds=feedback`", "another method for `dpo`"]),
    ([SFT_DPO, "data@sft.data=ultrafeedback"], ["these rows are preferences", "`sft` needs demonstrations"]),
    ([RM, "rm.loss_type=x"], ["unknown key `rm.loss_type`"]),
    ([RM, "sft.from=rm", "stages=[rm,sft]", "rm.from=null"], ["`rm` trains a reward model, and a policy is needed"]),
    (["recipe=quickstart", "sft.packing=true", "sft.max_length=null"], ["`sft.packing` needs `sft.max_length`"]),
    (
        ["recipe=quickstart", "sft.assistant_only_loss=true", "sft.completion_only_loss=true"],
        ["`sft.assistant_only_loss` and `sft.completion_only_loss` exclude each other"],
    ),
    (["recipe=quickstart", "peft=qlora"], ["`peft.type=qlora` holds the weights of a checkpoint in 4 bits"]),
    # what Hydra refuses, beside what we do
    ([DPO, "~dpo.nothere", "dpo.learning_rte=1", "model=nope"], ["`~dpo.nothere`", "`dpo.learning_rte`", "`nope`"]),
    ([DPO, "+dpo.beta=0.3", "dpo.lr=1"], ["`+dpo.beta=0.3`", "`dpo.lr`"]),
    ([DPO, "dpo.run_name=${nope}"], ["`dpo.run_name=${nope}`"]),
    ([DPO, "run_dir=/dev/null/x"], ["`run_dir=/dev/null/x`", "/dev/null is not a folder"]),
    ([DPO, "dpo.run_name=hf_" + "aB3" * 8], ["`dpo.run_name` holds what looks like a token"]),
    ([DPO, "run_dir=x", "--new"], ["`--new`", "`run_dir`"]),
    ([DPO, "dpo.beta=interval(0,1)", "-m"], ["cannot sweep over `dpo.beta=interval(0,1)`"]),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_request(arguments, expected, capsys):
    from alignctl.cli.main import main

    with pytest.raises(SystemExit) as exited:
        main(["train", *arguments, "--dry-run"])
    said = capsys.readouterr()
    assert exited.value.code == 2
    assert said.out == ""
    for text in expected:
        assert text in said.err
    assert "Traceback" not in said.err


def test_all_mistakes_are_reported_together(alignctl, tmp_path):
    done = alignctl(
        "train", DPO, "model=nope", "dpo.learning_rte=1e-6", "dpo.beta=high", "stages=[dpo,rm]", "peft.lora_rank=8"
    )
    assert done.code == 2
    assert done.err.count("error: ") == 5
    for key in ("`nope`", "`dpo.learning_rte`", "`dpo.beta`", "`rm`", "`peft.lora_rank`"):
        assert key in done.err
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_kind_are_refused_with_the_columns(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    config, problems = compose(read_request([LOCAL, "model.path=a/b", f"data.path={rows}"]))
    (problem,) = problems + find_problems(config)
    assert "`prompt`, `completion`" in problem.message
    assert "would do as demonstrations" in problem.message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", "", "no rows"),
        ("torn.jsonl", '{"prompt": "a", \n', "line 1 is not JSON"),
        ("list.jsonl", "[1, 2]\n", "an object with named columns"),
        ("text.docx", "hello", "cannot read `.docx`"),
        ("head.csv", "prompt,chosen,rejected\n", "no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    config, _ = compose(read_request([LOCAL, "model.path=a/b", f"data.path={tmp_path / name}"]))
    (problem,) = find_problems(config)
    assert expected in problem.message


def test_settings_of_accelerate_in_a_file_are_looked_at(tmp_path):
    file = tmp_path / "accelerate.json"
    for content, expected in (({"split_batches": True}, 1), ({"split_batches": False, "non_blocking": True}, 0)):
        file.write_text(json.dumps(content))
        config, _ = compose(read_request([DPO, f"dpo.accelerator_config={file}"], []))
        assert sum("split_batches" in problem.message for problem in find_problems(config)) == expected


def test_an_adapter_of_another_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')

    def problems(*arguments):
        config, found = compose(
            read_request([*SHARED, "stages=[ppo]", "ppo.from=null", f"ppo.reward_model={tmp_path}", *arguments])
        )
        return found + find_problems(config)

    (problem,) = problems("model=local", "model.path=c/d")
    assert "is an adapter of a/b, but `ppo` starts from `c/d`" in problem.message
    assert "`model.path=a/b`" in problem.hint
    assert problems("model=local", "model.path=a/b") == []


def test_a_field_of_trl_the_recipe_does_not_list_is_accepted():
    config, problems = compose(read_request([DPO, "dpo.ld_alpha=0.5", "dpo.rpo=1"]))
    messages = [problem.message for problem in problems + find_problems(config)]
    assert messages == ["unknown key `dpo.rpo`"]


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
LABELLED = {"prompt": "p", "completion": "a", "label": True}
*_OTHERS, _LAST = sorted(name for name, method in methods().items() if method.data_kind != "demonstrations")
FOR_PAIRS = f"{', '.join(f'`{name}`' for name in _OTHERS)} or `{_LAST}`"


@pytest.mark.parametrize(
    ("recipe", "row", "expected"),
    [
        (
            "dpo_local",
            LABELLED,
            [
                "`prompt`, `completion`, `label`",
                "no preferences (two completions of each prompt",
                "`grpo`, `kto`, `ppo` or `rloo`",
            ],
        ),
        ("sft_local", PAIR, ["no demonstrations (answers to imitate)", FOR_PAIRS]),
        ("kto_local", {"prompt": "p", "completion": "a"}, ["no feedback (single completions", "`rloo` or `sft`"]),
        ("reward_local", {"question": "p"}, ["the columns `question`", "Formats: hh_rlhf"]),
    ],
)
def test_rows_for_another_method_name_it(tmp_path, capsys, recipe, row, expected):
    from alignctl.cli.main import main

    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as exited:
        main(["train", f"recipe={recipe}", "model.path=owner/model", f"data.path={file}", "--dry-run"])
    assert exited.value.code == 2
    said = capsys.readouterr().err
    for words in expected:
        assert words in said, said


@pytest.mark.parametrize("row_format", ["auto", "preference"])
def test_pairs_do_for_kto(tmp_path, row_format):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PAIR) + "\n")
    request = read_request(["recipe=kto_local", "model.path=a/b", f"data.path={file}", f"data.format={row_format}"])
    assert find_problems(compose(request)[0]) == []


def test_conversations_and_a_checkpoint_without_template_are_told_apart(tmp_path):
    """Both are on this machine, so the check can see it before a worker starts."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer_config.json").write_text("{}")
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}))
    arguments = ["recipe=sft_local", f"model.path={model}", f"data.path={file}"]
    (problem,) = find_problems(compose(read_request(arguments))[0])
    assert "has no chat template" in problem.message
    assert "`model.chat_template=FILE`" in problem.hint
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    assert find_problems(compose(read_request([*arguments, f"model.chat_template={template}"]))[0]) == []
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert find_problems(compose(read_request(arguments))[0]) == []


def test_a_role_may_be_a_stage_or_a_checkpoint(tmp_path, monkeypatch):
    """`reference: sft` means the stage, whatever folder is called so."""
    (tmp_path / "sft").mkdir()
    monkeypatch.chdir(tmp_path)
    config, problems = compose(read_request([KTO, "kto.from=null", "kto.reference=sft"]))
    assert problems + find_problems(config) == []
    plan = make_plan(absolute_paths(config), "mine", tmp_path / "run")
    assert plan.stages[1].roles == {"policy": "random weights", "reference": str(tmp_path / "run" / "sft" / "model")}
    other, _ = compose(read_request([KTO, "kto.reference=owner/model"]))
    assert find_problems(other) == []
    changed = make_plan(absolute_paths(other), "mine", tmp_path / "run")
    assert changed.stages[1].roles["reference"] == "owner/model"
    assert changed.stages[1].environment.get("HF_HUB_OFFLINE") is None  # it is fetched from the Hub
    assert changed.stages[1].fingerprint != plan.stages[1].fingerprint


def test_packages_of_a_container_are_not_looked_for_here():
    kernels = ("model.attn_implementation=flash_attention_2", "dpo.use_liger_kernel=true", "dpo.optim=lomo")
    said = [problem.message for problem in find_problems(compose(read_request([DPO, *kernels]))[0])]
    assert sum("needs the package" in one for one in said) == 3
    inside = ("launcher=slurm", "launcher.container=[apptainer,exec,image.sif]", *kernels)
    said = [problem.message for problem in find_problems(compose(read_request([DPO, *inside]))[0])]
    assert not any("needs the package" in one for one in said)


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "./rows.jsonl", "link.jsonl", "copy.jsonl", "packed.jsonl.gz", "[copy.jsonl]", "*.jsonl.gz"]
)
def test_rows_that_are_trained_on_are_not_held_out(tmp_path, monkeypatch, name):
    """However the file is called, and whichever copy of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR))
    (tmp_path / "copy.jsonl").write_text(json.dumps(PAIR))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    config, _ = compose(read_request([LOCAL, "model.path=a/b", "data.path=rows.jsonl", f"data.eval_path={name}"]))
    (problem,) = find_problems(config)
    assert "`data.eval_path` is " in problem.message
    assert "trained on" in problem.message


def test_rows_are_made_of_what_a_file_has(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"in": {"q": "p"}, "good": "a", "bad": "b"}))
    given = [LOCAL, "model.path=a/b", f"data.path={tmp_path / 'rows.jsonl'}"]
    columns = "data.columns={prompt: in.q, chosen: good, rejected: bad}"
    for more, expected in (
        ([columns], []),
        ([columns.replace("in.q", "in.a")], ["the rows have no `in.a`"]),
        (["data.columns=[in]"], ["`data.columns` must be a mapping", "the rows have the columns `in`"]),
        ([columns, "data.use=chosen"], ["`data.use=chosen` would have no effect"]),
    ):
        config, problems = compose(read_request([*given, *more]))
        messages = [problem.message for problem in problems + find_problems(config)]
        assert len(messages) == len(expected), messages
        for message, words in zip(messages, expected, strict=True):
            assert words in message
