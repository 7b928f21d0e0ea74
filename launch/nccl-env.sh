# NCCL's variables for a training over several nodes; sourced by the batch scripts, and the place for those of your site.
# shellcheck shell=bash
#
# Variables that switch off a path (NCCL_P2P_DISABLE, NCCL_SHM_DISABLE, NCCL_IB_DISABLE), choose an algorithm or print more
# than warnings are for finding a fault. Take them out again afterwards: they cost speed and hide what is wrong.

# The interfaces by which the ranks meet: prefixes, ^ for all but these.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^docker,lo,virbr}
# On hosts whose InfiniBand ports are not all of one fabric, name those that are:
#     export NCCL_IB_HCA=mlx5_0,mlx5_1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
