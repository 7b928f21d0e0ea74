# NCCL environment variables for runs on several nodes, sourced by the batch scripts. Add your site's settings here.
# shellcheck shell=bash
#
# Variables that disable a transport (NCCL_P2P_DISABLE, NCCL_SHM_DISABLE, NCCL_IB_DISABLE), force an algorithm or raise the log level
# are for debugging. Remove them afterwards: they cost speed and hide the actual problem.

# Network interfaces for connecting the ranks: prefixes; ^ excludes them.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^docker,lo,virbr}
# If a host's InfiniBand ports belong to different fabrics, list the ports of the common one:
#     export NCCL_IB_HCA=mlx5_0,mlx5_1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
