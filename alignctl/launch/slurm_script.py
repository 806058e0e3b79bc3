"""The script that a SLURM job runs, and the options it is submitted with: pure functions. Torch-free.

There is one template for all sites. No setting is written into it unquoted but `launcher.setup`, which is shell code.
Options of sbatch are words of a command line, not `#SBATCH` lines, in which a quote in a path would be trouble.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from alignctl.config.schema import LauncherSettings
from alignctl.config.secrets import in_shell
from alignctl.errors import EXIT_INTERRUPTED, EXIT_LAUNCH, EXIT_STOPPED
from alignctl.launch.queue import ENDED
from alignctl.plan.plan import StagePlan
from alignctl.run.paths import StagePaths

_PORTS = 10_000, 20_000  # first, and how many: below those that systems give away themselves
_OTHERS_END_S = 60  # from the end of one machine's part to that of the others; alignctl ends them within 30
_OLD_STEP_S = 120  # on top of KillWait, for what a job's start before left to end
_NOTICE_S = 120  # on top of SlurmdTimeout, for SLURM to notice that a machine is gone
_NUMBERED = ("sh", "-c", 'exec "$@" --machine="$SLURM_NODEID"', "sh")
"""Words before the command of each machine that tell it which one it is: a container may hide the variable."""

_TEMPLATE = """\
#!/bin/bash
# Stage {stage} of {run}; written by alignctl.
set -euo pipefail

stage={folder}
job=$SLURM_JOB_ID  # that of an array's last part stands for the whole array
[[ -z ${{SLURM_ARRAY_TASK_ID:-}} ]] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
asked='' caught='' step=''
trap 'asked=${{asked:-USR1}} caught=1; [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true' USR1
trap 'asked=TERM caught=1' TERM  # cancelled, preempted or out of time: SLURM tells the step itself

{one_at_a_time}unset "${{!SCONTROL_@}}" "${{!SRUN_@}}"  # a person's own, of a login shell
{setup}# Where the machines of this job meet: on the first, at a port of this job's own.
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=$(scontrol -o show node "${{machines%%$'\\n'*}}")
first=${{first##* NodeAddr=}} first=${{first%% *}}
port=$(({first_port} + SLURM_JOB_ID % {ports}))

saved() {{ ls "$stage/checkpoints" "$stage/evaluation_before.json" 2>/dev/null || true; }}
before=$(saved)
rm -f "$stage"/ranks/node_*_ended

code={interrupted}
if [[ -z $asked ]]; then
    {srun} --meet="$first:$port" &
    step=$!
    while caught='' code=0; do
        wait "$step" || code=$?
        [[ -n $caught ]] && ((code > 128)) || break  # else it was the signal that ended waiting
    done
fi

back() {{
    if (({max_requeues} <= ${{SLURM_RESTART_COUNT:-0}})); then
        echo "stopped, and not back into the queue: launcher.max_requeues={max_requeues}"
    elif scontrol requeue "$job"; then
        echo "stopped; back into the queue, for the $((${{SLURM_RESTART_COUNT:-0}} + 1)). time"
    else
        echo "stopped, and SLURM does not take the job back; alignctl resume goes on"
    fi
}}
preempted() {{ [[ $(scontrol -o show job "$job") == *" PreemptTime="[0-9]* ]]; }}
if ((code == {stopped} || code > 128)) && {{ [[ $asked == USR1 ]] || preempted; }}; then
    if [[ $asked == USR1 && $(saved) == "$before" ]]; then
        echo "stopped: there was no time for anything that could be continued from; raise launcher.time"
    else
        back
    fi
elif ((code != 0 && code != {stopped} && {max_requeues} > 0)) && [[ -z $asked && -e $stage/ranks/node_0_ended ]]; then
    for ((machine = 1; machine < {nodes}; machine++)); do
        [[ ! -e $stage/ranks/node_${{machine}}_ended ]] || continue
        echo "machine $machine of this job ended without a word; SLURM requeues the job once it sees that it is gone"
        timeout=$(scontrol show config | sed -n 's/^SlurmdTimeout *= \\([0-9]*\\) .*/\\1/p')
        sleep $((${{timeout:-300}} + {notice})) & wait $! || true
        break
    done
fi
exit "$code"
"""

_ONE_AT_A_TIME = """\
# One job at a time is at the stage. Which one is what this link says, which is made whole or not at all: the job's id,
# how often it was started anew, and where its script runs.
lock={lock}
mine="$job ${{SLURM_RESTART_COUNT:-0}} $(uname -n) $$"
trap '[[ $(readlink "$lock") != "$mine" ]] || rm -f "$lock"' EXIT
ended() {{  # JOB
    local said
    if said=$(scontrol -o show job "$1" 2>&1); then
        [[ $said =~ JobState=({ended})' ' ]]
    else
        [[ $said == *"Invalid job id"* ]]
    fi
}}
limit=''
until [[ -n $asked ]] || ln -sT "$mine" "$lock" 2>/dev/null || [[ $(readlink "$lock") == "$mine" ]]; do
    if ! holder=$(readlink "$lock"); then  # let go of just now, or no link can be made here
        said=$(ln -sT "$mine" "$lock" 2>&1) || [[ -L $lock ]] || {{ echo "error: $said"; exit {refused}; }}
        continue
    fi
    if ! [[ $holder =~ ^[0-9_]+' '(0|[1-9][0-9]*)' '[^' ']+' '[0-9]+$ ]]; then
        echo "error: $lock is no link of a job of alignctl's"
        exit {refused}
    fi
    read -r other starts host process <<<"$holder"
    if [[ $other != "$job" ]] || ((starts >= ${{SLURM_RESTART_COUNT:-0}})); then
        if ! ended "$other"; then
            echo "error: job $other is at $stage, so job $job does nothing"
            echo "hint: see it with scontrol show job $other; if that is no job of this run, remove $lock"
            exit {refused}
        fi
    elif [[ $host != "$(uname -n)" || -e /proc/$process ]]; then  # this job's start before, as far as can be seen
        if [[ -z $limit ]]; then
            echo "waits until what this job's start before left has ended"
            kill_wait=$(scontrol show config | sed -n 's/^KillWait *= \\([0-9]*\\) .*/\\1/p')
            limit=$((SECONDS + ${{kill_wait:-30}} + {old_step}))
        fi
        if ((SECONDS < limit)); then
            sleep 2 & wait $! || true
            continue
        fi
    fi
    [[ $(readlink "$lock") == "$holder" ]] || continue  # else another took it over while this one asked
    ln -sfT "$mine" "$lock"
    sleep 1  # another may have done so in the same moment: the last one has it
done

"""

_SETUP = """\
set +u  # of which modules and environments know nothing
trap 'echo "launcher.setup failed: $BASH_COMMAND"' ERR
{lines}
trap - ERR
set -u

"""

_ARRAY_TEMPLATE = """\
#!/bin/bash
# Stage {stage} of several points of a sweep; written by alignctl.
set -euo pipefail
scripts=(
{scripts}
)
exec bash "${{scripts[SLURM_ARRAY_TASK_ID]}}"
"""


def render_script(stage: StagePlan, run_dir: str, paths: StagePaths) -> str:
    """The script of one stage's job. It sees to it that no other job is at the stage, starts alignctl on each machine
    of the job, has it save when SLURM says that time is running out, goes back into the queue then, and ends with
    alignctl's exit code."""
    launcher = stage.config.launcher
    setup = in_shell("\n".join([launcher.setup] if isinstance(launcher.setup, str) else launcher.setup))
    return _TEMPLATE.format(
        stage=stage.config.name,
        run=_one_line(run_dir),
        one_at_a_time=_ONE_AT_A_TIME.format(
            lock=shlex.quote(str(paths.job_lock)), refused=EXIT_LAUNCH, old_step=_OLD_STEP_S, ended="|".join(ENDED)
        ),
        setup=_SETUP.format(lines=setup) if setup else "",
        srun=shlex.join([*_srun(launcher), *_NUMBERED, *launcher.container, *stage.command]),
        first_port=_PORTS[0],
        ports=_PORTS[1],
        folder=shlex.quote(str(paths.root)),
        nodes=launcher.nodes,
        max_requeues=launcher.max_requeues,
        stopped=EXIT_STOPPED,
        interrupted=EXIT_INTERRUPTED,
        notice=_NOTICE_S,
    )


def render_array_script(stage: str, scripts: Sequence[Path]) -> str:
    """The script of an array: the job with number N runs the N-th of some scripts."""
    return _ARRAY_TEMPLATE.format(stage=stage, scripts="\n".join(shlex.quote(str(script)) for script in scripts))


def sbatch_options(launcher: LauncherSettings, name: str, log: Path) -> list[str]:
    """Options of sbatch for a stage, one word each; dependencies are not among them.

    Args:
        name: Of the job.
        log: What the job prints goes there; sbatch's patterns (`%j`) in its last part.
    """
    cpus = launcher.cpus_per_process and launcher.cpus_per_process * launcher.processes_per_node
    given = {
        "job-name": name,
        "nodes": launcher.nodes,
        "ntasks-per-node": 1,
        "gres": launcher.gpus_per_node
        and ":".join(filter(None, ["gpu", launcher.gpu_type, str(launcher.gpus_per_node)])),
        "cpus-per-task": cpus,
        "mem": launcher.mem,
        "partition": _joined(launcher.partition),
        "account": launcher.account,
        "qos": _joined(launcher.qos),
        "constraint": _joined(launcher.constraint),
        "nodelist": _joined(launcher.nodelist),
        "time": launcher.time,
        "signal": f"B:USR1@{launcher.signal_seconds}",
        "output": str(log.parent).replace("%", "%%") + "/" + log.name,
        "open-mode": "append",
    }
    options = [f"--{option}={value}" for option, value in given.items() if value is not None]
    return [*options, "--requeue" if launcher.max_requeues else "--no-requeue", *launcher.extra]


def _joined(names: str | list[str] | None) -> str | None:
    """One name or several, as sbatch takes them."""
    return (",".join(names) or None) if isinstance(names, list) else names


def job_name(recipe: str, stage: StagePlan) -> str:
    """Of a stage's job: letters, digits and a few signs, whatever the recipe is called."""
    return re.sub(r"[^\w.,+@=-]+", "_", f"{stage.config.launcher.job_name or recipe}-{stage.config.name}")


def _srun(launcher: LauncherSettings) -> list[str]:
    """One task on each machine: alignctl, which starts the workers there. It sees what `launcher.setup` has set, also
    where sbatch was told to hand nothing on (`--export=NONE`), which srun would go by."""
    cpus = launcher.cpus_per_process and launcher.cpus_per_process * launcher.processes_per_node
    return [
        "srun", f"--nodes={launcher.nodes}", f"--ntasks={launcher.nodes}", "--ntasks-per-node=1",
        *([f"--cpus-per-task={cpus}"] if cpus else []), "--kill-on-bad-exit=0", f"--wait={_OTHERS_END_S}",
        "--export=ALL", *launcher.srun,
    ]  # fmt: skip


def _one_line(text: str) -> str:
    return " ".join(text.split())
