# What every script here shares: a site's settings, the environment of a job, and the line that starts nanochat in it.
# Sourced, never run. Needs bash 4.2, nothing else.
# shellcheck shell=bash
# shellcheck disable=SC2034 # Most of what is set here is read by those who source it.

# What a site file may set. A name that is misspelt is refused, as it would otherwise do nothing, in silence.
KNOWN_SETTINGS="HOSTS PARTITION CPU_PARTITION ACCOUNT GPU_TYPE GPUS_PER_NODE CPUS_PER_GPU CPUS SBATCH_OPTIONS
  GPU_OPTIONS MAX_TIME MAX_REQUEUES STOP_BEFORE SCRATCH TMP BINDS MODULES NETWORK DRIVER IMAGE
  IMAGE_SHA256 IMAGE_SIGNED VENV SECRETS MAIL"

# The site files that a name ($1, or NANOCHAT_SITE) or this host stands for, one a line.
site_file() {
  local name=${1:-${NANOCHAT_SITE:-}} file hosts
  case $name in
  */*) echo "$name" ;;
  ?*) echo "$JOB_SCRIPTS/sites/$name.env" ;;
  *)
    for file in "$JOB_SCRIPTS"/sites/*.env; do
      hosts=$(sed -n "s/^SITE_HOSTS=['\"]\{0,1\}\([^'\"]*\).*/\1/p" "$file")
      # shellcheck disable=SC2053 # A pattern.
      if [[ $HOSTNAME == $hosts ]]; then echo "$file"; fi
    done
    ;;
  esac
}

# The names that a site file sets, one a line.
site_names() {
  sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\)=.*/\1/p' "$1"
}

# Read a site file. Bash evaluates it, in a process of its own, so a value may use $USER; only the names that the file
# itself sets come back. Those without SITE_ are for the trainer, as NCCL_IB_HCA is.
load_site() {
  local name assignments
  assignments=$(
    set +u
    # shellcheck source=/dev/null
    source "$1" >/dev/null 2>&1 || exit 1
    for name in $(site_names "$1"); do printf '%s=%q\n' "$name" "${!name}"; done
  ) || return 1
  eval "$assignments"
  SITE_EXPORTS=$(site_names "$1" | grep -v '^SITE_' | tr '\n' ' ' || true)
}

# Fill in what a site file leaves out. The caller's own NANOCHAT_BASE_DIR, NANOCHAT_IMAGE and NANOCHAT_VENV win.
complete_site() {
  local name
  for name in $KNOWN_SETTINGS; do
    name=SITE_$name
    printf -v "$name" %s "${!name:-}"
  done
  : "${SITE_GPUS_PER_NODE:=1}" "${SITE_MAX_REQUEUES:=20}" "${SITE_STOP_BEFORE:=180}"
  : "${SITE_CPU_PARTITION:=$SITE_PARTITION}" "${SITE_SECRETS:=$HOME/.config/nanochat/secrets.env}"
  : "${NANOCHAT_BASE_DIR:=${SITE_SCRATCH:+$SITE_SCRATCH/nanochat}}"
  [[ -n ${NANOCHAT_IMAGE:-}${NANOCHAT_VENV:-} ]] || NANOCHAT_IMAGE=$SITE_IMAGE NANOCHAT_VENV=$SITE_VENV
  : "${NANOCHAT_IMAGE:=}" "${NANOCHAT_VENV:=}"
}

# Modules are for Apptainer itself. Called before set_environment, which undoes what else they bring.
load_modules() {
  local settings=$-
  [[ -n $SITE_MODULES ]] || return 0
  set +u
  # A batch shell is not a login shell, so the function may not be there yet.
  # shellcheck source=/dev/null
  type module >/dev/null 2>&1 || source "${LMOD_PKG:-${MODULESHOME:-/usr/share/modules}}/init/bash"
  # shellcheck disable=SC2086 # A list of names.
  module load $SITE_MODULES
  [[ $settings != *u* ]] || set -u
}

# Whether a name is one that only the file of keys may set.
is_secret() {
  [[ $1 == @(WANDB_API_KEY|HF_TOKEN|AZURE_STORAGE_*) ]]
}

# Keys for W&B and the hub, from a file that only its owner can read. What the environment has already wins.
load_secrets() {
  local name value
  SECRETS_READ=''
  [[ -r $SITE_SECRETS ]] || return 0
  while IFS='=' read -r name value || [[ -n $name ]]; do
    if is_secret "$name" && [[ -z ${!name:-} ]]; then export "$name=$value" && SECRETS_READ+=" $name"; fi
  done <"$SITE_SECRETS"
}

# Leave nothing of the login's Python, preloaded libraries or start files to the trainer, and keep what it writes on
# scratch: a home folder is small, and may be read-only on compute nodes.
set_environment() {
  local name
  unset PYTHONPATH PYTHONHOME PYTHONSTARTUP LD_PRELOAD BASH_ENV ENV
  # sbatch leaves this behind where a job asked for few variables; steps then start without a PATH.
  unset SLURM_EXPORT_ENV
  export PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1
  export NANOCHAT_BASE_DIR WANDB_MODE="${WANDB_MODE:-offline}" WANDB_DIR="${WANDB_DIR:-$NANOCHAT_BASE_DIR/wandb}"
  export HF_HOME="${HF_HOME:-$NANOCHAT_BASE_DIR/cache/huggingface}"
  export TMPDIR="${SITE_TMP:-$NANOCHAT_BASE_DIR/cache/tmp}${SLURM_JOB_ID:+/$SLURM_JOB_ID}"
  if [[ -n $SITE_NETWORK ]]; then export NCCL_SOCKET_IFNAME=$SITE_NETWORK GLOO_SOCKET_IFNAME=$SITE_NETWORK; fi
  for name in $SITE_EXPORTS; do export "${name?}"; done
  load_secrets
}

# NANOCHAT becomes the words that start `nanochat` in the image, or in a Python environment where none is named.
# $1: how many GPUs the container is to see. Home, the current folder's file system and /tmp are the host's, as
# Apptainer has it by default: --containall would leave 64 MB for temporary files, and --cleanenv would take RANK away.
build_command() {
  local folder
  if [[ -z $NANOCHAT_IMAGE ]]; then
    NANOCHAT=("$NANOCHAT_VENV/bin/nanochat")
    return
  fi
  NANOCHAT=(apptainer --quiet exec)
  if (($1 > 0)); then NANOCHAT+=(--nv); fi
  for folder in $SITE_SCRATCH "$NANOCHAT_BASE_DIR" "$WANDB_DIR" "$HF_HOME" "$TMPDIR" "$PWD" $SITE_BINDS; do
    if must_be_bound "$folder"; then NANOCHAT+=(--bind "$folder"); fi
  done
  NANOCHAT+=(--pwd "$PWD" "$NANOCHAT_IMAGE" nanochat)
}

# Whether a folder is not in the container yet: in $HOME, or in one that is bound already.
must_be_bound() {
  local bound
  for bound in "$HOME" "${NANOCHAT[@]}"; do
    [[ $bound != /?* || $1/ != "$bound"/* ]] || return 1
  done
  [[ -e ${1%%:*} ]]
}

# A time limit in Slurm's notation (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S), in seconds. Fails if it is none.
seconds_of() {
  local days hours=0 minutes=0 seconds=0
  [[ $1 =~ ^(([0-9]+)-)?([0-9]+)(:([0-9]+))?(:([0-9]+))?$ ]] || return 1
  local a=${BASH_REMATCH[3]} b=${BASH_REMATCH[5]} c=${BASH_REMATCH[7]}
  days=${BASH_REMATCH[2]}
  if [[ -n $days || -n $c ]]; then
    hours=$a minutes=${b:-0} seconds=${c:-0}
  else
    minutes=$a seconds=${b:-0}
  fi
  echo $((((10#${days:-0} * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))
}
