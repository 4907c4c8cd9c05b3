# One attempt of a job: begin, run a step, and judge it by what it left. Sourced by the batch scripts.
# A step's exit code proves nothing: srun returns 0 when a node was lost, and 143 when it stopped the others because one
# failed. So task.sh leaves a file in the attempt's folder: DONE, STOPPED (at a checkpoint), or rank-N.exit with a code.
# shellcheck shell=bash

# shellcheck source=env.sh
source "$JOB_SCRIPTS/env.sh"

JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
# The id alone would be wrong for an array: its last task has the id of the whole, and requeueing that restarts all.
JOB=${JOB:-$SLURM_JOB_ID}
JOB_FOLDER=$JOB_LOGS/$JOB
STEP=''
STOPPED_BY=''
CLOCK=''

say() {
  printf 'job %s: %s\n' "$JOB" "$1"
}

fail() {
  say "$1" >&2
  exit 1
}

begin_attempt() {
  load_modules
  set_environment
  mkdir -p "$JOB_FOLDER" "$TMPDIR"
  build_command "$JOB_VISIBLE_GPUS"
  rm -f "$JOB_FOLDER"/{DONE,STOPPED} "$JOB_FOLDER"/rank-*.exit
  : >"$JOB_FOLDER/started"
  export NANOCHAT_JOB_FOLDER=$JOB_FOLDER NANOCHAT_LOG=$JOB_LOGS/$JOB_KIND-$JOB.log
  trap 'stop USR1' USR1
  trap 'stop TERM' TERM
  trap 'end_attempt' EXIT
  watch_the_clock
  say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: nanochat$(printf ' %q' "${JOB_ARGUMENTS[@]}")"
}

end_attempt() {
  [[ -z $CLOCK ]] || kill "$CLOCK" 2>/dev/null || true
  rm -rf "$TMPDIR"
}

# Slurm sends USR1 ahead of the time limit, to this shell alone; scancel and preemption send TERM. srun hands USR1 on to
# every task, and the trainers agree on a step, write a checkpoint and end.
stop() {
  if [[ $1 == TERM || -z $STOPPED_BY ]]; then STOPPED_BY=$1; fi
  say "SIG$1: stopping"
  if [[ -n $STEP ]]; then kill -USR1 "$STEP" 2>/dev/null || true; fi
}

# Slurm's own signal was seen to come up to a minute early, and once not at all. This one is on time.
watch_the_clock() {
  local left
  left=$(squeue --noheader --jobs="$JOB" --format=%L 2>/dev/null) && left=$(seconds_of "$left") || return 0
  ((left > SITE_STOP_BEFORE)) || return 0
  (sleep $((left - SITE_STOP_BEFORE)) && kill -USR1 $$) &
  CLOCK=$!
}

# The first host of the allocation is where rank 0 and this shell run, so the port is tried where it is needed.
# 20000 to 29999 lies below what systems hand out by themselves; a step of 97 keeps neighbouring jobs apart.
find_rendezvous() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
  while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
    say "port $MASTER_PORT of $MASTER_ADDR is taken"
    MASTER_PORT=$((20000 + (MASTER_PORT + 97) % 10000))
  done
  export MASTER_ADDR MASTER_PORT
}

# Run a command as $1 tasks on each node, with its output in the file $2, or in the job's log where that is empty. srun
# is put into the background because a shell that waits for it in the foreground hears signals only when it has ended.
run_step() {
  local tasks=$1 output=()
  [[ -z $STOPPED_BY ]] || return 0
  if ((tasks * SLURM_JOB_NUM_NODES > 1)); then output=(--label); fi
  if [[ -n $2 ]]; then output=(--open-mode=append "--output=$JOB_FOLDER/$2"); fi
  export NANOCHAT_TASKS_PER_NODE=$tasks
  srun --kill-on-bad-exit=1 --wait=300 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((tasks * SLURM_JOB_NUM_NODES))" \
    --ntasks-per-node="$tasks" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${output[@]+"${output[@]}"} \
    bash "$JOB_SCRIPTS/task.sh" "${@:3}" &
  STEP=$!
  # A signal ends `wait` early.
  while kill -0 "$STEP" 2>/dev/null; do wait "$STEP" || true; done
  STEP=
}

# One look on every node, before all of them wait for one that has a GPU less, or an older driver.
look_at_nodes() {
  run_step 1 doctor-%N.log "${NANOCHAT[@]}" doctor --expect-gpus "$JOB_VISIBLE_GPUS" \
    ${SITE_DRIVER:+--expect-driver "$SITE_DRIVER"}
  if [[ ! -e $JOB_FOLDER/DONE ]]; then
    grep -s PROBLEM "$JOB_FOLDER"/doctor-*.log >&2 || true
    conclude
  fi
  rm -f "$JOB_FOLDER/DONE"
}

# Whether this attempt left a checkpoint, a finished stage or finished pieces of data that were not there before.
made_progress() {
  local found
  found=$(find "$JOB_PROGRESS" -newer "$JOB_FOLDER/started" -type f \( -path '*_checkpoints/*/step_*/manifest.json' \
    -o -path '*/stages/*.json' -o -name '*.receipt.json' \) -print 2>/dev/null | head -n 1)
  [[ -n $found ]]
}

# End the job as the step did. The last that runs: a requeue kills this shell.
conclude() {
  if [[ -e $JOB_FOLDER/DONE ]]; then
    say "done"
  elif [[ $STOPPED_BY == TERM ]] && ! may_still_run; then
    fail "stopped by SIGTERM, so not requeued — carry on: $JOB_AGAIN"
  elif compgen -G "$JOB_FOLDER/rank-*.exit" >/dev/null || [[ -z $STOPPED_BY && ! -e $JOB_FOLDER/STOPPED ]]; then
    tell_who_failed
  else
    requeue
  fi
}

# SIGTERM comes with scancel and at the time limit, when the job is over for Slurm, and ahead of a preemption, when
# it is not: then the job has to ask for another attempt.
may_still_run() {
  [[ $(squeue --noheader --jobs="$JOB" --format=%T 2>/dev/null) == RUNNING ]]
}

requeue() {
  ((${SLURM_RESTART_COUNT:-0} < SITE_MAX_REQUEUES)) ||
    fail "stopped, and requeued $SLURM_RESTART_COUNT times before, which is SITE_MAX_REQUEUES — carry on: $JOB_AGAIN"
  made_progress ||
    fail "stopped without a new checkpoint: another attempt would end as this one — with more --time: $JOB_AGAIN"
  say "requeued; the next attempt carries on"
  # Slurm now ends this shell, which is no news.
  trap '' USR1 TERM
  scontrol requeue "$JOB" || fail "Slurm did not requeue it — carry on: $JOB_AGAIN"
}

# The rank that ended first is the cause; srun stopped the others because of it.
tell_who_failed() {
  local first
  first=$(cat "$JOB_FOLDER"/rank-*.exit 2>/dev/null | sort -n | head -n 1)
  [[ -n $first ]] || fail "ended without a result, as when a node is lost — read $NANOCHAT_LOG; carry on: $JOB_AGAIN"
  read -r _ rank code host <<<"$first"
  say "rank $rank on $host ended first, with exit code $code — read $NANOCHAT_LOG; carry on: $JOB_AGAIN" >&2
  exit "$code"
}
