//! The ranks of one machine, among whose GPUs experts are divided (`--shard-frozen`).

use std::collections::BTreeSet;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::panic::panic_any;
use std::sync::{Arc, LazyLock};

use super::ranks::Rank;
use crate::backend::cuda::Peers;
use crate::collective::{Collective, all_ok};
use crate::exit::{self, Failure, Result};

/// The ranks that run under this machine's kernel.
pub struct MachinePeers {
    world: Arc<dyn Collective>,
    /// Their numbers in the world, ascending.
    members: Vec<usize>,
    index: usize,
    in_process: bool,
}

/// The identity of the running kernel, the same in all containers of a machine:
/// <https://docs.kernel.org/admin-guide/sysctl/kernel.html#random>.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A number of this process; unlike the process id, no two containers have the same.
static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());

impl MachinePeers {
    /// Those of this rank, itself included; `None` if each rank of the run is alone on its machine. All ranks call it together.
    ///
    /// # Errors
    /// A machine whose ranks are not all found.
    pub fn find(rank: &Rank) -> Result<Option<Self>> {
        let machine = fs::read_to_string(BOOT_ID).unwrap_or_default();
        let own = format!("{} {}", machine.trim(), *PROCESS);
        let all = rank.world.all_gather(own.as_bytes())?;
        let found = Self::among(rank.world.clone(), &all);
        let (count, expected) = (found.members.len(), rank.local_world_size);
        let message = || {
            format!(
                "--shard-frozen: the launcher started {expected} ranks on the machine of rank {}, but {count} of all ranks run under its \
                 kernel: start the ranks of a machine as one job step and not in containers that the launcher takes for machines, or use \
                 --offload host",
                rank.world.rank()
            )
        };
        let complete = if count == expected { Ok(()) } else { Err(Failure::new(exit::LAUNCHER, message())) };
        all_ok(&*rank.world, complete)?;
        let machines: BTreeSet<&[u8]> = all.iter().map(|text| machine_of(text)).collect();
        Ok((machines.len() < all.len()).then_some(found))
    }

    /// The ranks on the machine of this one. `all`: the identity of each rank's machine, and its process.
    fn among(world: Arc<dyn Collective>, all: &[Vec<u8>]) -> Self {
        let own = &all[world.rank()];
        let members: Vec<usize> = (0..all.len()).filter(|rank| machine_of(&all[*rank]) == machine_of(own)).collect();
        let index = members.iter().position(|member| *member == world.rank()).expect("this rank is on its machine");
        let in_process = members.iter().all(|member| all[*member] == *own);
        Self { world, members, index, in_process }
    }
}

fn machine_of(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == b' ').next().unwrap_or_default()
}

impl Peers for MachinePeers {
    fn index(&self) -> usize {
        self.index
    }

    fn count(&self) -> usize {
        self.members.len()
    }

    fn in_process(&self) -> bool {
        self.in_process
    }

    fn exchange(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut all = self.world.all_gather(bytes).unwrap_or_else(|error| panic_any(error));
        self.members.iter().map(|member| std::mem::take(&mut all[*member])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::threads;

    #[test]
    fn ranks_are_told_apart_by_machine_and_process() {
        let find = |all: &[&str]| {
            let all: Vec<Vec<u8>> = all.iter().map(|text| text.as_bytes().to_vec()).collect();
            let found = MachinePeers::among(Arc::new(threads::single()), &all);
            (found.members, found.in_process)
        };
        assert_eq!(find(&["a 1", "b 1"]), (vec![0], true));
        assert_eq!(find(&["a 1", "a 1"]), (vec![0, 1], true));
        assert_eq!(find(&["a 1", "b 1", "a 2"]), (vec![0, 2], false));
    }
}
