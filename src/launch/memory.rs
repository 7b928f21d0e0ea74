//! Memory of the host, and sizes in text.

use std::path::Path;

use crate::backend::Backend;
use crate::train::memory::MemoryBudget;

/// The memory of one of `local_world_size` ranks that share this machine.
pub fn budget(backend: &impl Backend, local_world_size: usize, vocab_size: usize) -> MemoryBudget {
    MemoryBudget::new(backend, vocab_size, || free_memory() / local_world_size as u64)
}

/// Free memory in bytes: `MemAvailable` of the kernel, bounded by the limits of this process's control groups.
pub fn free_memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let available = read("/proc/meminfo")
        .and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
            Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
        })
        .unwrap_or(u64::MAX / 2);
    let own = read("/proc/self/cgroup").unwrap_or_default();
    let limits = HIERARCHIES.iter().flat_map(|hierarchy| {
        // The limit of every ancestor holds too.
        Path::new(hierarchy.group_of(&own)).ancestors().filter_map(|group| hierarchy.free(group))
    });
    limits.fold(available, u64::min)
}

/// Where a version of Linux' control groups keeps the memory of a group:
/// <https://docs.kernel.org/admin-guide/cgroup-v2.html>, <https://docs.kernel.org/admin-guide/cgroup-v1/memory.html>.
struct Hierarchy {
    mount: &'static str,
    /// The controller in the lines `ID:CONTROLLERS:/PATH` of `/proc/PID/cgroup`; empty for version 2.
    controller: &'static str,
    limit: &'static str,
    used: &'static str,
    /// The page cache of a group and those below it, in `memory.stat`.
    cache: [&'static str; 2],
}

const HIERARCHIES: [Hierarchy; 2] = [
    Hierarchy {
        mount: "/sys/fs/cgroup",
        controller: "",
        limit: "memory.max",
        used: "memory.current",
        cache: ["inactive_file", "active_file"],
    },
    Hierarchy {
        mount: "/sys/fs/cgroup/memory",
        controller: "memory",
        limit: "memory.limit_in_bytes",
        used: "memory.usage_in_bytes",
        cache: ["total_inactive_file", "total_active_file"],
    },
];

impl Hierarchy {
    /// The group of a process, relative to the mount point, from `/proc/PID/cgroup`; the root group where there is no such line,
    /// or where the path leaves this process's cgroup namespace.
    fn group_of<'t>(&self, cgroup: &'t str) -> &'t str {
        let path_of = |line: &'t str| {
            let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
            controllers.split(',').any(|name| name == self.controller).then_some(path)
        };
        let path = cgroup.lines().find_map(path_of).unwrap_or("");
        if path.split('/').any(|part| part == "..") { "" } else { path }
    }

    /// Free bytes of a group; `None` without a limit.
    fn free(&self, group: &Path) -> Option<u64> {
        let file = |name: &str| std::fs::read_to_string(Path::new(self.mount).join(group).join(name)).ok();
        self.free_of(&file(self.limit)?, &file(self.used)?, &file("memory.stat").unwrap_or_default())
    }

    /// Free bytes of a group, from its limit, its use and its `memory.stat`. Page cache (memory-mapped weights, say) counts as
    /// free: the kernel reclaims it. Version 1 has a huge number for "no limit", which bounds nothing.
    fn free_of(&self, limit: &str, used: &str, stat: &str) -> Option<u64> {
        let (limit, used): (u64, u64) = (limit.trim().parse().ok()?, used.trim().parse().ok()?);
        let cached = stat.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            if self.cache.contains(&name) { bytes.trim().parse::<u64>().ok() } else { None }
        });
        Some(limit.saturating_sub(used.saturating_sub(cached.sum())))
    }
}

/// Peak resident set size of this process, in bytes.
pub fn peak_resident() -> u64 {
    // SAFETY: getrusage writes a plain struct that we own; zeroed is a valid value of it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    usage.ru_maxrss as u64 * 1024
}

/// Whether so many bytes are far more than are free: a quarter more, which is beyond the error of the forecast.
pub fn far_beyond(needed: u64, free: u64) -> bool {
    needed > free.saturating_add(free / 4)
}

/// `1.5 GB`, in decimal units.
pub fn human(bytes: u64) -> String {
    scaled(bytes, &["B", "kB", "MB", "GB", "TB"])
}

/// `6.9 billion`.
pub fn human_count(n: u64) -> String {
    scaled(n, &["", "thousand", "million", "billion", "trillion"]).trim_end().to_owned()
}

/// `n` in the largest unit that leaves at least 1; each unit is a thousand of the previous one.
fn scaled(n: u64, units: &[&str]) -> String {
    let mut value = n as f64;
    let mut place = 0;
    while value >= 1000.0 && place + 1 < units.len() {
        value /= 1000.0;
        place += 1;
    }
    let digits = usize::from(place > 0);
    format!("{value:.digits$} {}", units[place])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_files_are_free_memory_of_a_group() {
        let [v2, v1] = &HIERARCHIES;
        let stat = "anon 500\nfile 320\ninactive_anon 7\ninactive_file 200\nactive_file 100\nslab 9\n";
        assert_eq!(v2.free_of("1000\n", "900\n", stat), Some(400));
        assert_eq!(v2.free_of("1000\n", "900\n", ""), Some(100));
        assert_eq!(v2.free_of("1000", "1200", "inactive_file 100"), Some(0));
        assert_eq!(v2.free_of("max\n", "900\n", stat), None);
        let stat = "cache 1\ninactive_file 2\nactive_file 3\ntotal_inactive_file 200\ntotal_active_file 100\n";
        assert_eq!(v1.free_of("1000\n", "900\n", stat), Some(400));
        assert!(v1.free_of("9223372036854771712\n", "900\n", stat).is_some_and(|free| free > 1 << 62), "no limit");
    }

    #[test]
    fn the_group_is_that_of_this_process() {
        let [v2, v1] = &HIERARCHIES;
        assert_eq!(v2.group_of("0::/slurm/job_7/step_0\n"), "slurm/job_7/step_0");
        assert_eq!(v2.group_of("12:memory:/old\n0::/\n"), "");
        assert_eq!(v2.group_of("12:memory:/old\n"), "");
        assert_eq!(v2.group_of("0::/../other\n"), "");
        let both = "11:cpu,cpuacct:/a\n4:memory,hugetlb:/slurm/uid_5/job_7\n1:name=systemd:/b\n0::/c\n";
        assert_eq!((v1.group_of(both), v2.group_of(both)), ("slurm/uid_5/job_7", "c"));
        assert_eq!(v1.group_of("0::/c\n"), "");
    }

    #[test]
    fn bytes_in_text() {
        assert_eq!(human(999), "999 B");
        assert_eq!(human(61_100_000_000), "61.1 GB");
        assert_eq!(human_count(999), "999");
        assert_eq!(human_count(6_919_161_856), "6.9 billion");
    }
}
