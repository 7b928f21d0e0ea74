//! The kernel for AMX: two by two tile registers of sums, each 16 by 16 f32; two tiles of A and two of B are 16 lines by 64
//! bytes each (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18).

use std::arch::asm;
use std::cell::Cell;

use super::instructions::Instructions;
use super::shape::{BLOCK, Shape};

const SHAPE: Shape = Shape::of(Instructions::Amx);

/// Memory layout of `ldtilecfg`: palette 1, for each tile its bytes per row and its rows.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: TileConfig = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (row_bytes[tile], rows[tile]) = (64, 16);
        tile += 1;
    }
    TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

thread_local! {
    static CONFIGURED: Cell<bool> = const { Cell::new(false) };
}

/// Prefetches 1 KiB from `$at` bytes after the pointer on: half of what the block after next reads there. Panels come
/// from the L2 cache, and the hardware's own prefetching leaves a quarter of the rate unused.
macro_rules! prefetch {
    ($pointer:literal, $at:literal) => {
        concat!(
            ".irp line, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960\n",
            "prefetcht0 [{",
            $pointer,
            "} + ",
            $at,
            " + \\line]\n",
            ".endr"
        )
    };
}

pub(super) fn multiply(a: &[u32], b: &[u32], c: &mut [f32], accumulate: bool) {
    if !CONFIGURED.get() {
        // SAFETY: `Products::new`, and the trial before it, use these instructions only where they exist and Linux permits them. The
        // configuration is part of the thread's state; nothing else in this process uses tiles.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly, preserves_flags)) };
        CONFIGURED.set(true);
    }
    let blocks = a.len() / (SHAPE.a * BLOCK);
    if blocks == 0 {
        if !accumulate {
            c.fill(0.0);
        }
        return;
    }
    // SAFETY: `kernel::multiply` has checked the lengths: `blocks` times 2 KiB in a and in b, 32 by 32 elements in c. The
    // loads and stores need no alignment. The tile registers are declared as overwritten.
    unsafe {
        asm!(
            "test {accumulate:e}, {accumulate:e}",
            "jnz 2f",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "jmp 3f",
            "2:",
            "tileloadd tmm0, [{c} + {wide}*1]",
            "tileloadd tmm1, [{c} + {wide}*1 + 64]",
            "tileloadd tmm2, [{c} + {wide}*1 + 2048]",
            "tileloadd tmm3, [{c} + {wide}*1 + 2112]",
            "3:",
            "tileloadd tmm4, [{a} + {narrow}*1]",
            "tileloadd tmm6, [{b} + {wide}*1]",
            "tileloadd tmm7, [{b} + {wide}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            prefetch!("a", 4096),
            "tileloadd tmm5, [{a} + {narrow}*1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            prefetch!("b", 4096),
            "tdpbf16ps tmm2, tmm5, tmm6",
            prefetch!("a", 5120),
            "tdpbf16ps tmm3, tmm5, tmm7",
            prefetch!("b", 5120),
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {blocks}",
            "jnz 3b",
            "tilestored [{c} + {wide}*1], tmm0",
            "tilestored [{c} + {wide}*1 + 64], tmm1",
            "tilestored [{c} + {wide}*1 + 2048], tmm2",
            "tilestored [{c} + {wide}*1 + 2112], tmm3",
            accumulate = in(reg) u32::from(accumulate),
            a = inout(reg) a.as_ptr() => _,
            b = inout(reg) b.as_ptr() => _,
            blocks = inout(reg) blocks => _,
            c = in(reg) c.as_mut_ptr(),
            narrow = in(reg) 64usize,
            wide = in(reg) 128usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
