//! How much memory a run takes, from shapes alone; and what a forward pass can afford to keep.

use std::path::Path;

use crate::backend::Backend;
use crate::config::Recompute;
use crate::model::{LayerKind, ModelConfig};

/// Where a rank's tensors are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Bytes of one element of an activation.
    pub activation: usize,
    /// Rows whose logits it holds at once at most, and how many logits a row has.
    pub logits: (usize, usize),
    /// Bytes that it may take.
    pub free: u64,
    /// Whether that is the memory of a device; weights are copied there, and not memory-mapped.
    pub device: bool,
}

impl Place {
    /// Of one of `here` ranks on this machine, with so many tokens in its vocabulary.
    pub fn of(backend: &impl Backend, here: usize, vocabulary: usize) -> Self {
        let own = backend.free_memory();
        Self {
            activation: backend.activation_size(),
            logits: (backend.rows_of_logits(vocabulary), vocabulary),
            free: own.unwrap_or_else(|| free_memory() / here as u64),
            device: own.is_some(),
        }
    }

    /// Bytes of logits and their gradient that exist at once for `rows` tokens.
    pub fn logits(&self, rows: usize) -> u64 {
        let (most, vocabulary) = self.logits;
        (rows.min(most) * vocabulary * (4 + self.activation)) as u64
    }
}

/// Bytes of activations for one micro-batch of `rows` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activations {
    /// The saved input of one layer.
    pub input: u64,
    /// What one layer keeps so that its backward computes nothing again.
    pub kept: u64,
    /// What is alive beside that while one layer's backward runs, or the head's.
    pub working: u64,
}

impl Activations {
    /// The largest layer's figures there.
    pub fn predict(config: &ModelConfig, rows: usize, place: &Place) -> Self {
        let (t, size) = (rows as u64, place.activation as u64);
        let d = config.hidden_size as u64;
        let heads = config.heads.first().expect("a model has layers");
        let (q, kv) = ((heads.queries * heads.dim) as u64, (heads.keys * heads.dim) as u64);
        let norms = if config.qk_norm == crate::model::QkNorm::None { 0 } else { q + kv };
        let attention = 2 * q + 2 * kv + norms;
        let routed = config.num_experts_per_tok as u64;
        let f = config.expert_width as u64;
        let shared = config.shared_expert_width.unwrap_or(0) as u64;
        let dense = config.layers.iter().map(|k| if let LayerKind::Dense(w) = k { *w as u64 } else { 0 }).max();
        let moe = routed * 2 * f + config.num_experts as u64 + 2 * shared + if shared > 0 { d } else { 0 };
        let kept = attention + d + moe.max(2 * dense.unwrap_or(0));
        // Gathered rows and their gradients [R, D], SwiGLU's output, its gradient and that of its input [R, 4F], and a few [T, D].
        let working = routed * (2 * d + 4 * f) + 4 * d + 3 * (q + 2 * kv);
        let working = (t * working * size).max(place.logits(rows));
        Self { input: t * d * size, kept: t * kept * size, working }
    }

    /// The lowest layer that keeps its activations, of `layers` layers of which a backward visits those from `lowest` up, where
    /// `passes` forward passes wait for their backward at once.
    pub fn keep_from(&self, recompute: Recompute, layers: usize, lowest: usize, place: &Place, passes: usize) -> usize {
        let visited = layers.saturating_sub(lowest);
        let affordable = match recompute {
            Recompute::Never => visited,
            // The top layer is the first that its backward visits: keeping it costs nothing beyond what recomputing would.
            Recompute::Always => 1,
            Recompute::Auto => (self.budget(visited, place, passes) / self.kept.max(1)).max(1) as usize,
        };
        layers - affordable.min(visited)
    }

    /// Bytes for what a pass keeps. The host has other tenants, and the pages of memory-mapped weights: a quarter of what is free.
    /// A device's memory is the run's: what nothing else needs, but for an eighth, for its free parts do not always fit.
    fn budget(&self, visited: usize, place: &Place, passes: usize) -> u64 {
        if !place.device {
            return place.free / 4;
        }
        let others = self.working.saturating_add(passes as u64 * visited as u64 * self.input);
        (place.free - place.free / 8).saturating_sub(others) / passes.max(1) as u64
    }

    /// Peak of one forward and backward.
    pub fn peak(&self, layers: usize, lowest: usize, keep_from: usize) -> u64 {
        let visited = layers.saturating_sub(lowest) as u64;
        let kept = layers.saturating_sub(keep_from).max(1) as u64;
        visited * self.input + kept * self.kept + self.working
    }
}

/// Bytes that training adds on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainedState {
    /// The gradient in f32 and the new weights: on every rank whole.
    pub whole: u64,
    /// Masters and two moments in f32, and the sum of the gradient: each rank has its part.
    pub sharded: u64,
}

impl TrainedState {
    /// For `trained` elements of `weight` bytes each.
    pub fn predict(trained: u64, weight: u64, world_size: usize) -> Self {
        let sharded = if world_size == 1 { 12 * trained } else { (16 * trained).div_ceil(world_size as u64) };
        Self { whole: trained * (4 + weight), sharded }
    }
}

/// Bytes of memory that this process may still take: what the kernel calls available, and no more than the control
/// group allows.
pub fn free_memory() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let available = read("/proc/meminfo")
        .and_then(|text| {
            let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
            Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
        })
        .unwrap_or(u64::MAX / 2);
    let own = read("/proc/self/cgroup").unwrap_or_default();
    // A limit holds for all groups below it, so each one on the way up counts.
    let groups = Path::new(group_of(&own)).ancestors().map(|group| {
        let file = |name: &str| std::fs::read_to_string(Path::new(GROUPS).join(group).join(name)).ok();
        free_in_group(&file("memory.max")?, &file("memory.current")?, &file("memory.stat").unwrap_or_default())
    });
    groups.flatten().fold(available, u64::min)
}

/// Where version 2 of control groups is mounted: <https://docs.kernel.org/admin-guide/cgroup-v2.html>.
const GROUPS: &str = "/sys/fs/cgroup";

/// The group of a process, relative to [`GROUPS`], from its `/proc/PID/cgroup`: the line `0::/path`. The topmost where there
/// is none, or where it lies outside of what this process sees.
fn group_of(cgroup: &str) -> &str {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    if path.split('/').any(|part| part == "..") { "" } else { path }
}

/// Bytes that a group may still take, from its `memory.max`, `memory.current` and `memory.stat`; `None` without a limit.
/// `memory.current` counts cached pages of files, such as those of memory-mapped weights, which give way.
fn free_in_group(max: &str, current: &str, stat: &str) -> Option<u64> {
    let (max, current): (u64, u64) = (max.trim().parse().ok()?, current.trim().parse().ok()?);
    let cached = stat.lines().filter_map(|line| {
        let (name, bytes) = line.split_once(' ')?;
        if matches!(name, "inactive_file" | "active_file") { bytes.trim().parse::<u64>().ok() } else { None }
    });
    Some(max.saturating_sub(current.saturating_sub(cached.sum())))
}

/// The largest resident size this process has had, in bytes.
pub fn peak_resident() -> u64 {
    // SAFETY: getrusage writes a plain struct that we own; zeroed is a valid value of it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    usage.ru_maxrss as u64 * 1024
}

/// `1.5 GB`: decimal, for people.
pub fn human(bytes: u64) -> String {
    scaled(bytes, &["B", "kB", "MB", "GB", "TB"])
}

/// `6.9 billion`, for people.
pub fn human_count(n: u64) -> String {
    scaled(n, &["", "thousand", "million", "billion", "trillion"]).trim_end().to_owned()
}

/// In the largest unit, each a thousand of the one before, of which there is at least one.
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
    fn keeps_what_fits_and_always_the_top() {
        let a = Activations { input: 10, kept: 100, working: 50 };
        let host = |free| Place { activation: 4, logits: (0, 8), free, device: false };
        assert_eq!(a.keep_from(Recompute::Never, 16, 4, &host(0), 1), 4);
        assert_eq!(a.keep_from(Recompute::Always, 16, 4, &host(u64::MAX), 1), 15);
        assert_eq!(a.keep_from(Recompute::Auto, 16, 4, &host(4 * 350), 1), 13);
        assert_eq!(a.keep_from(Recompute::Auto, 16, 4, &host(0), 1), 15);
        assert_eq!(a.keep_from(Recompute::Auto, 16, 16, &host(u64::MAX / 2), 1), 16);
        // A device: 7/8 of it less 50 and 12 inputs of 10 are 3 layers of 100; for two passes at once, a layer each.
        let device = |free| Place { device: true, ..host(free) };
        assert_eq!(a.keep_from(Recompute::Auto, 16, 4, &device(544), 1), 13);
        assert_eq!(a.keep_from(Recompute::Auto, 16, 4, &device(544), 2), 15);
        assert_eq!(a.keep_from(Recompute::Auto, 16, 4, &device(0), 1), 15);
        assert!(a.peak(16, 0, 15) < a.peak(16, 0, 8));
    }

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
    fn bytes_for_people() {
        assert_eq!(human(999), "999 B");
        assert_eq!(human(61_100_000_000), "61.1 GB");
        assert_eq!(human_count(999), "999");
        assert_eq!(human_count(6_919_161_856), "6.9 billion");
    }
}
