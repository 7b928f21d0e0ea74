//! Which instructions multiply bf16 values, and the sizes of the caches.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// The instructions that compute products of bf16 values. All of them multiply exactly and add in f32; they differ in the
/// order and the rounding of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instructions {
    /// `tdpbf16ps` on tile registers (Intel AMX). Subnormal values count as zero.
    Amx,
    /// The tiles of [`Self::Amx`], computed by ordinary instructions: for tests on processors without them.
    AmxEmulated,
    /// `vdpbf16ps` (AVX-512 BF16). Subnormal values count as zero.
    Avx512Bf16,
    /// bf16 values widened to f32, `vfmadd231ps` on 512-bit vectors (AVX-512 F).
    Avx512,
    /// bf16 values widened to f32, whatever vector instructions the processor has.
    Portable,
}

impl Instructions {
    /// All of them, the fastest first.
    pub const ALL: [Self; 5] = [Self::Amx, Self::Avx512Bf16, Self::Avx512, Self::Portable, Self::AmxEmulated];

    /// The name in messages and in the environment variable.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::AmxEmulated => "amx-emulated",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
            Self::Portable => "portable",
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Instructions {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|i| i.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|i| i.name()).collect();
            format!("unknown instructions {name:?}; there are {}", names.join(", "))
        })
    }
}

/// What of this a processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Processor {
    /// AMX tiles with bf16, and the operating system's permission to use them.
    pub amx: bool,
    /// AVX-512 BF16.
    pub avx512_bf16: bool,
    /// AVX-512 F, BW, DQ and VL.
    pub avx512: bool,
    /// Made by Intel, whose `vdpbf16ps` has a quarter of the rate of its `vfmadd231ps`, so that it does half the work a second
    /// (Emerald Rapids: 82 against 168 GFLOP/s a core). AMD's does twice the work (Zen 4: 225 against 115).
    pub intel: bool,
}

impl Processor {
    /// The processor this program runs on. Asks Linux for permission to use AMX, for the whole process.
    pub(super) fn of_this_machine() -> Self {
        detected()
    }

    /// Whether products of bf16 values take less time than those of f32.
    pub fn gains_from_bf16(&self) -> bool {
        matches!(self.fastest(), Instructions::Amx | Instructions::Avx512Bf16)
    }

    /// Whether it can run these instructions.
    pub fn has(&self, instructions: Instructions) -> bool {
        match instructions {
            // Its panels are packed by AVX-512 BF16.
            Instructions::Amx => self.avx512 && self.avx512_bf16 && self.amx,
            Instructions::Avx512Bf16 => self.avx512 && self.avx512_bf16,
            Instructions::Avx512 => self.avx512,
            Instructions::Portable | Instructions::AmxEmulated => true,
        }
    }

    /// The instructions to use: `forced` if given, otherwise the fastest.
    ///
    /// # Errors
    /// The processor lacks the forced ones.
    pub fn choose(&self, forced: Option<Instructions>) -> Result<Instructions, String> {
        match forced {
            Some(i) if self.has(i) => Ok(i),
            Some(i) => Err(format!("this processor has no {i} instructions; it would use {}", self.fastest())),
            None => Ok(self.fastest()),
        }
    }

    fn fastest(&self) -> Instructions {
        if self.has(Instructions::Amx) {
            Instructions::Amx
        } else if self.has(Instructions::Avx512Bf16) && !self.intel {
            Instructions::Avx512Bf16
        } else if self.avx512 {
            Instructions::Avx512
        } else {
            Instructions::Portable
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn detected() -> Processor {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let id = __cpuid(0);
    let vendor = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes);
    // Leaf 7: bit 22 of EDX is AMX-BF16, bit 24 AMX-TILE.
    let tiles = id.eax >= 7 && __cpuid_count(7, 0).edx >> 22 & 0b101 == 0b101;
    Processor {
        amx: tiles && may_use_tiles(),
        avx512_bf16: is_x86_feature_detected!("avx512bf16"),
        avx512: is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl"),
        intel: vendor.as_flattened() == b"GenuineIntel",
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detected() -> Processor {
    Processor { amx: false, avx512_bf16: false, avx512: false, intel: false }
}

/// Asks for permission to use the tile data of AMX (Linux 5.16; Documentation/arch/x86/xstate.rst). The answer holds for
/// all threads.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this call changes nothing but the process's permission; it fails with an error code on other kernels.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn may_use_tiles() -> bool {
    false
}

/// Sizes of the caches of one core, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caches {
    /// Level 2.
    pub l2: usize,
}

impl Caches {
    /// The caches of the first core, as Linux reports them; where it does not, 1 MiB.
    pub fn detect() -> Self {
        static FOUND: OnceLock<Caches> = OnceLock::new();
        *FOUND.get_or_init(Self::of_this_machine)
    }

    fn of_this_machine() -> Self {
        let read = |index: u32, name: &str| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
            std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
        };
        let level_2 = (0..4).find(|&index| read(index, "level").as_deref() == Some("2"));
        let size = level_2.and_then(|index| read(index, "size"));
        let kib = size.and_then(|size| size.strip_suffix('K')?.parse::<usize>().ok());
        Self { l2: kib.map_or(1 << 20, |kib| kib << 10) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Processor = Processor { amx: false, avx512_bf16: false, avx512: false, intel: true };

    #[test]
    fn the_fastest_instructions_that_the_processor_has() {
        let choose = |p: Processor| p.choose(None).unwrap();
        assert_eq!(choose(NONE), Instructions::Portable);
        let avx512 = Processor { avx512: true, ..NONE };
        assert_eq!(choose(avx512), Instructions::Avx512);
        let intel = Processor { avx512_bf16: true, ..avx512 };
        assert_eq!(choose(intel), Instructions::Avx512);
        assert_eq!(choose(Processor { intel: false, ..intel }), Instructions::Avx512Bf16);
        assert_eq!(choose(Processor { amx: true, ..intel }), Instructions::Amx);
        assert_eq!(choose(Processor { amx: true, avx512: false, ..intel }), Instructions::Portable);
        assert!(!intel.gains_from_bf16() && Processor { amx: true, ..intel }.gains_from_bf16());
    }

    #[test]
    fn forced_instructions_must_exist() {
        assert_eq!(NONE.choose(Some(Instructions::AmxEmulated)), Ok(Instructions::AmxEmulated));
        let error = NONE.choose(Some(Instructions::Amx)).unwrap_err();
        assert!(error.contains("no amx instructions") && error.contains("portable"), "{error}");
        for i in Instructions::ALL {
            assert_eq!(i.name().parse(), Ok(i));
        }
        assert!("sse".parse::<Instructions>().unwrap_err().contains("avx512-bf16"));
    }
}
