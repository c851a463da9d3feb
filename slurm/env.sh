# Environment of a job's ranks; sourced by train.sbatch. Change it for your cluster.

# Memory that NCCL registers with the network card is locked, and a low limit fails late and unclearly.
ulimit -l unlimited 2>/dev/null || true
ulimit -n 65536 2>/dev/null || true

# A rank that dies ends the others' collectives with an error instead of leaving them to hang.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

# Name the interface where a node has several, or gloo and NCCL may pick one that other nodes cannot reach:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Model hub: fetch once on a login node, then keep jobs off the network.
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1

# One preparation of data for all nodes needs a folder that they share.
# export FULLTUNE_CACHE=/shared/fulltune
