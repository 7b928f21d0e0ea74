//! The launchers: for each operation what it allocates and which kernels it queues. One file a family, named as the CPU's.
