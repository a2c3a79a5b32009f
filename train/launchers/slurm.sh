#!/usr/bin/env bash
#SBATCH --job-name=optjax
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --output=%x-%j.log
# Pretrains under Slurm, one process on each node: sbatch --nodes N --gpus-per-node M slurm.sh ARGUMENTS of pretrain
# Told to stop (the time is nearly over, or the job is preempted), the run saves, and the job queues itself again.
set -uo pipefail
(($#)) || { echo "sbatch --nodes N --gpus-per-node M $0 ARGUMENTS of optjax.train.pretrain" >&2; exit 2; }

step= told=
tell() {
  told=1
  [[ -z "$step" ]] || scancel --signal TERM --full "$SLURM_JOB_ID.0" 2>/dev/null || kill -TERM "$step"
}
trap tell TERM
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m optjax.train.pretrain "$@" &
early=$told step=$!
# A signal that came before there was a step to tell.
[[ -z "$early" ]] || tell
# wait ends when a signal comes, the step does not.
while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done
wait "$step"
status=$?
# Once one process has saved and ended with 75, srun ends those that are still on their way out, and has their signal
# for its status.
if ((status == 75 || (${told:-0} && status > 128))); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
