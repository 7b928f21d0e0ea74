//! Memory of the host, and sizes in text.

use std::path::Path;

use crate::backend::Backend;
use crate::train::memory::MemoryBudget;

/// The memory of one of `local_world_size` ranks that share this machine.
pub fn budget(backend: &impl Backend, local_world_size: usize, vocab_size: usize) -> MemoryBudget {
    MemoryBudget::new(backend, vocab_size, || free_memory() / local_world_size as u64)
}

/// Free memory in bytes: `MemAvailable` of the kernel, bounded by the limits of this process's control group (cgroup v2).
pub fn free_memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let available = read("/proc/meminfo")
        .and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
            Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
        })
        .unwrap_or(u64::MAX / 2);
    let own = read("/proc/self/cgroup").unwrap_or_default();
    // The limit of every ancestor holds too.
    let groups = Path::new(group_of(&own)).ancestors().map(|group| {
        let file = |name: &str| std::fs::read_to_string(Path::new(GROUPS).join(group).join(name)).ok();
        free_in_group(&file("memory.max")?, &file("memory.current")?, &file("memory.stat").unwrap_or_default())
    });
    groups.flatten().fold(available, u64::min)
}

/// The mount point of cgroup v2: <https://docs.kernel.org/admin-guide/cgroup-v2.html>.
const GROUPS: &str = "/sys/fs/cgroup";

/// The cgroup of a process, relative to [`GROUPS`], from the line `0::/path` of `/proc/PID/cgroup`; the root cgroup where
/// there is no such line, or where the path leaves this process's cgroup namespace.
fn group_of(cgroup: &str) -> &str {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    if path.split('/').any(|part| part == "..") { "" } else { path }
}

/// Free bytes of a cgroup, from its `memory.max`, `memory.current` and `memory.stat`; `None` without a limit. Page cache
/// (memory-mapped weights, say) counts as free: the kernel reclaims it.
fn free_in_group(max: &str, current: &str, stat: &str) -> Option<u64> {
    let (max, current): (u64, u64) = (max.trim().parse().ok()?, current.trim().parse().ok()?);
    let cached = stat.lines().filter_map(|line| {
        let (name, bytes) = line.split_once(' ')?;
        if matches!(name, "inactive_file" | "active_file") { bytes.trim().parse::<u64>().ok() } else { None }
    });
    Some(max.saturating_sub(current.saturating_sub(cached.sum())))
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
        let stat = "anon 500\nfile 320\ninactive_anon 7\ninactive_file 200\nactive_file 100\nslab 9\n";
        assert_eq!(free_in_group("1000\n", "900\n", stat), Some(400));
        assert_eq!(free_in_group("1000\n", "900\n", ""), Some(100));
        assert_eq!(free_in_group("1000", "1200", "inactive_file 100"), Some(0));
        assert_eq!(free_in_group("max\n", "900\n", stat), None);
    }

    #[test]
    fn the_group_is_that_of_this_process() {
        assert_eq!(group_of("0::/slurm/job_7/step_0\n"), "slurm/job_7/step_0");
        assert_eq!(group_of("12:memory:/old\n0::/\n"), "");
        assert_eq!(group_of("12:memory:/old\n"), "");
        assert_eq!(group_of("0::/../other\n"), "");
    }

    #[test]
    fn bytes_in_text() {
        assert_eq!(human(999), "999 B");
        assert_eq!(human(61_100_000_000), "61.1 GB");
        assert_eq!(human_count(999), "999");
        assert_eq!(human_count(6_919_161_856), "6.9 billion");
    }
}
