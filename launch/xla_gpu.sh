# shellcheck shell=bash
# Sourced by the launch scripts where a command runs on NVIDIA GPUs. XLA refuses to start with a
# flag that it does not know, so tests/test_launch_hosts.py tries each of them.

xla_gpu_flags=(
  # Starts collectives as early, and waits for them as late, as the data allows: the all-reduce of
  # one layer's gradients runs beside the backward pass of the next.
  --xla_gpu_enable_latency_hiding_scheduler=true
)
# Those that were set before come last, and win.
export XLA_FLAGS="${xla_gpu_flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"

# The share of a GPU's memory that JAX takes when it starts: its own 0.75 leaves a quarter unused,
# and more than 0.9 leaves too little for what cuBLAS and NCCL take beside it.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
