//! `Nvidia` and NCCL's communicator on a stand-in for the libraries (`tests/stand_in/cuda.c`), whose streams run
//! everything as late as allowed: calls, arguments and their order, and that every resource is freed.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use moewarden::backend::Dtype;
use moewarden::backend::cuda::gpu::{Address, Arg, Gemm, Gpu, Grid, Kernel, LoadPart, Operand, Source};
use moewarden::backend::cuda::kernels::MODULES;
use moewarden::backend::cuda::nvidia::library::{self, Library, Surroundings};
use moewarden::backend::cuda::nvidia::{Error, Nvidia};
use moewarden::collective::nccl::{Communicator, DeviceCollective, Nccl};
use moewarden::collective::threads;

/// Set in the process with the stand-in, to the folder of the kernel cache.
const INSIDE: &str = "MOEWARDEN_TEST_STAND_IN";

/// The loader reads `LD_LIBRARY_PATH` when a process starts, so this test runs itself in a second one.
#[test]
fn the_calls_are_those_that_the_libraries_expect() {
    if let Some(cache) = std::env::var_os(INSIDE) {
        return inside(Path::new(&cache));
    }
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("libcuda.so.1");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in/cuda.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-w", "-o"]).arg(&library).arg(source).status();
    assert!(built.expect("tests need a C compiler").success());
    for name in ["libcuda.so", "libnvrtc.so.13", "libcublas.so.13", "libnccl.so.2"] {
        std::os::unix::fs::symlink(&library, folder.path().join(name)).unwrap();
    }
    let inside = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "driver::the_calls_are_those_that_the_libraries_expect", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder.path())
        .env(INSIDE, folder.path().join("kernels"))
        .output()
        .unwrap();
    let said = [inside.stdout, inside.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(inside.status.success() && said.contains("all was looked at"), "{said}");
}

/// The stand-in's counter of this name.
fn count(name: &str) -> i32 {
    // SAFETY: the stand-in is loaded; the symbol is an int.
    unsafe {
        let library = libloading::Library::new("libcuda.so.1").unwrap();
        **library.get::<*const i32>(name).unwrap()
    }
}

fn inside(cache: &Path) {
    let surroundings = Surroundings::read(|name| std::env::var_os(name));
    let open = |index| Nvidia::open(index, &surroundings, Some(cache));
    assert!(matches!(open(1), Err(Error::NoSuchDevice { index: 1, devices: 1 })));

    let gpu = open(0).unwrap();
    assert_eq!(count("stand_in_compilations") as usize, MODULES.len());
    assert_eq!((gpu.name().as_str(), gpu.architecture().sm, gpu.architecture().processors), ("stand-in", 90, 132));
    // From another thread.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            copies(&gpu);
            small_copies(&gpu);
            room(&gpu);
            loads(&gpu);
            kernels(&gpu);
            products(&gpu);
            sums(&gpu, &library::open(Library::Nccl, 13, &surroundings).unwrap().path);
        });
    });
    // SAFETY: the other threads have ended.
    unsafe { std::env::set_var("STAND_IN_DEVICES", "2") };
    let second = open(1).unwrap();
    loads_from_another_gpu(&gpu, &second);
    drop((gpu, second));
    assert_eq!(count("stand_in_open"), 0, "every resource is freed");

    drop(open(0).unwrap());
    assert_eq!(count("stand_in_compilations") as usize, MODULES.len(), "the second start uses the cached kernels");
    println!("all was looked at");
}

/// Copies of every size: without staging, with part of one staging buffer, and with many turns of both.
fn copies(gpu: &Nvidia) {
    for len in [1, 64 << 10, (64 << 10) + 1, 8 << 20, (8 << 20) + 1, (45 << 20) + 7] {
        let (first, second) = (gpu.allocate(len).unwrap().unwrap(), gpu.allocate(len).unwrap().unwrap());
        let mut bytes: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let sent = bytes.clone();
        gpu.copy_in(first, &bytes).unwrap();
        bytes.fill(0xee); // allowed as soon as copy_in returns
        gpu.copy(first, second, len).unwrap();
        gpu.zero(first, len).unwrap();
        gpu.copy_out(second, &mut bytes).unwrap();
        assert!(bytes == sent, "{len} bytes came back changed");
        gpu.copy_out(first, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&b| b == 0), "{len} zeros");
        gpu.copy_in(first, &sent).unwrap();
        gpu.free(first).unwrap(); // while work is queued
        gpu.free(second).unwrap();
    }
}

/// Small copies never wait for the stream, and none is overwritten before it has run: the ring is filled several times.
fn small_copies(gpu: &Nvidia) {
    let (count, len) = (3000, 4 << 10);
    let at = gpu.allocate(count * len).unwrap().unwrap();
    let waits = self::count("stand_in_waits");
    let content = |i: usize| (0..len).map(move |j| (i * 31 + j * 7) as u8);
    for i in 0..count {
        let bytes: Vec<u8> = content(i).collect();
        gpu.copy_in(at.offset(i * len), &bytes).unwrap();
    }
    assert_eq!(self::count("stand_in_waits"), waits);
    let mut got = vec![0; count * len];
    gpu.copy_out(at, &mut got).unwrap();
    assert!(got.chunks(len).enumerate().all(|(i, chunk)| content(i).eq(chunk.iter().copied())));
    gpu.free(at).unwrap();
}

/// Loads run beside the stream, in chunks: nothing waits for them but what is queued after `await_load`, and they wait for what
/// was queued before them.
fn loads(gpu: &Nvidia) {
    let len = (40 << 20) + 5;
    let (host, slot, other) = (
        gpu.allocate_host(len).unwrap().unwrap(),
        gpu.allocate(len).unwrap().unwrap(),
        gpu.allocate(len).unwrap().unwrap(),
    );
    let content = |salt: usize| (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ salt as u8).collect();
    let [first, second]: [Vec<u8>; 2] = [1, 2].map(content);
    let mut got = vec![0; len];
    gpu.write_host(host, &first).unwrap();
    let waits = count("stand_in_waits");
    let from_host = LoadPart { from: Source::Host(host), to: slot, bytes: len };
    let load = gpu.load(&[from_host]).unwrap();
    gpu.await_load(load).unwrap();
    gpu.copy(slot, other, len).unwrap();
    // The slot is overwritten, but only after the copy from it.
    gpu.zero(slot, len).unwrap();
    let mut last = load;
    for _ in 0..9 {
        last = gpu.load(&[from_host]).unwrap(); // more loads than events
    }
    assert_eq!(count("stand_in_waits"), waits, "the host waits for none of it");
    gpu.await_load(last).unwrap();
    gpu.copy_out(other, &mut got).unwrap();
    assert!(got == first);
    gpu.copy_out(slot, &mut got).unwrap();
    assert!(got == first);
    // From the GPU to the host, and back.
    gpu.copy_in(other, &second).unwrap();
    gpu.store(other, host, len).unwrap();
    gpu.zero(other, len).unwrap();
    let load = gpu.load(&[from_host]).unwrap();
    gpu.read_host(host, &mut got).unwrap();
    assert!(got == second);
    gpu.write_host(host, &first).unwrap(); // waits for the load
    gpu.await_load(load).unwrap();
    gpu.copy_out(slot, &mut got).unwrap();
    assert!(got == second);
    gpu.free_host(host).unwrap();
    gpu.free(slot).unwrap();
    gpu.free(other).unwrap();
}

/// A load takes parts from several places, in chunks: here from the memory of another GPU, of another process (which the stand-in
/// lets be this one), and from its own.
fn loads_from_another_gpu(gpu: &Nvidia, owner: &Nvidia) {
    // SAFETY: the other threads have ended.
    unsafe { std::env::set_var("STAND_IN_IPC", "1") };
    let len = (20 << 20) + 3;
    let content = |salt: usize| (0..len).map(move |i: usize| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ salt as u8);
    let own = gpu.allocate(len).unwrap().unwrap();
    let [near, far] = [(); 2].map(|()| owner.allocate(100 + len).unwrap().unwrap());
    gpu.copy_in(own, &content(1).collect::<Vec<_>>()).unwrap();
    for (at, salt) in [(near, 2), (far, 3)] {
        owner.copy_in(at.offset(100), &content(salt).collect::<Vec<_>>()).unwrap();
    }
    owner.synchronize().unwrap();
    for _ in 0..2 {
        gpu.reach(near.offset(100)).unwrap(); // the second time it is reached already
    }
    gpu.reach(own).unwrap();
    let imported = gpu.import(&owner.export(far.offset(100)).unwrap()).unwrap();
    assert_eq!((imported.at.0 - imported.base.0, imported.base == far), (100, false));
    assert!(gpu.import(b"no handle").unwrap_err().to_string().contains("sent no handle"));

    let slot = gpu.allocate(3 * len).unwrap().unwrap();
    let sources = [near.offset(100), imported.at, own];
    let parts: Vec<_> =
        (0..3).map(|i| LoadPart { from: Source::Gpu(sources[i]), to: slot.offset(i * len), bytes: len }).collect();
    let load = gpu.load(&parts).unwrap();
    gpu.await_load(load).unwrap();
    let mut got = vec![0; 3 * len];
    gpu.copy_out(slot, &mut got).unwrap();
    assert!(content(2).chain(content(3)).chain(content(1)).eq(got));
    gpu.close(imported).unwrap();
    for at in [own, slot] {
        gpu.free(at).unwrap();
    }
    for at in [near, far] {
        owner.free(at).unwrap();
    }
    // SAFETY: as above.
    unsafe { std::env::remove_var("STAND_IN_IPC") };
    let plain = owner.allocate(8).unwrap().unwrap();
    let error = owner.export(plain).unwrap_err().to_string();
    assert!(error.contains("cuIpcGetMemHandle") && error.contains("--offload host"), "{error}");
    owner.free(plain).unwrap();
}

fn room(gpu: &Nvidia) {
    let before = gpu.memory().unwrap();
    assert_eq!(gpu.allocate(before.free + 1).unwrap(), None, "full memory is not a fault");
    let at = gpu.allocate(before.free).unwrap().unwrap();
    assert_eq!(gpu.memory().unwrap().free, 0);
    gpu.free(at).unwrap();
    assert_eq!(gpu.memory().unwrap(), before);
}

fn kernels(gpu: &Nvidia) {
    let kernel = |name| Kernel { module: MODULES[0], name };
    let sum = gpu.allocate(8).unwrap().unwrap();
    let mut bytes = [0; 8];
    for shared in [0, 47 << 10, 48 << 10, 200 << 10, 1 << 10] {
        let args = [Arg::Pointer(sum), Arg::F32(0.5), Arg::U32(7), Arg::U64(100)];
        let grid = Grid { blocks: [1, 2, 3], threads: 32, shared };
        // SAFETY: the stand-in's kernel takes these arguments.
        unsafe { gpu.launch(&kernel("add_all"), grid, &args) }.unwrap();
        gpu.copy_out(sum, &mut bytes).unwrap();
        assert_eq!(f64::from_ne_bytes(bytes), 0.5 + 7.0 + 100.0 + 1e3 + 2e4 + 3e5 + 32e6, "{shared} bytes shared");
    }
    // SAFETY: neither is launched.
    let refused = |name, grid| unsafe { gpu.launch(&kernel(name), grid, &[]) }.unwrap_err().to_string();
    let error = refused("unknown", Grid::row(1, 32));
    assert!(error.contains("unknown") && error.contains(MODULES[0].stem), "{error}");
    let error = refused("add_all", Grid::row(1, 32).shared(1 << 20));
    assert!(error.contains("1048576 bytes") && error.contains("the stand-in says no"), "{error}");
    gpu.free(sum).unwrap();
}

fn products(gpu: &Nvidia) {
    let (m, n, k) = (3, 4, 5);
    let a: Vec<f32> = (0..m * k).map(|i| i as f32 - 7.0).collect(); // [m, k]
    let b: Vec<f32> = (0..n * k).map(|i| (i * i % 11) as f32).collect(); // [n, k], to be transposed
    let c: Vec<f32> = (0..m * n).map(|i| i as f32).collect();
    let upload = |values: &[f32]| -> Address {
        let at = gpu.allocate(4 * values.len()).unwrap().unwrap();
        gpu.copy_in(at, bytemuck::cast_slice(values)).unwrap();
        at
    };
    let (at_a, at_b, at_c) = (upload(&a), upload(&b), upload(&c));
    let gemm = Gemm {
        m,
        n,
        k,
        a: Operand { at: at_a, stride: k, transposed: false },
        b: Operand { at: at_b, stride: k, transposed: true },
        dtype: Dtype::F32,
        c: at_c,
        c_stride: n,
        c_dtype: Dtype::F32,
        alpha: 2.0,
        beta: 3.0,
    };
    gpu.gemm(&gemm).unwrap();
    let mut got = vec![0f32; m * n];
    gpu.copy_out(at_c, bytemuck::cast_slice_mut(&mut got)).unwrap();
    for (row, col) in (0..m).flat_map(|row| (0..n).map(move |col| (row, col))) {
        let sum: f32 = (0..k).map(|i| a[row * k + i] * b[col * k + i]).sum();
        assert_eq!(got[row * n + col], 2.0 * sum + 3.0 * c[row * n + col], "[{row}, {col}]");
    }
    let error = gpu.gemm(&Gemm { c_dtype: Dtype::Bf16, ..gemm }).unwrap_err().to_string();
    assert!(error.contains("not supported") && error.contains("Bf16"), "{error}");
    for at in [at_a, at_b, at_c] {
        gpu.free(at).unwrap();
    }
}

fn sums(gpu: &Nvidia, nccl: &Path) {
    let load = || Nccl::load(nccl, 0).unwrap();
    let timeout = Duration::from_secs(60);
    // Two ranks on one GPU.
    std::thread::scope(|scope| {
        for host in threads::group(2, timeout) {
            scope.spawn(move || {
                gpu.bind().unwrap();
                let Err(error) = Communicator::new(load(), &host, gpu.stream(), timeout) else { panic!("they joined") };
                assert!(error.to_string().contains("ranks 0 and 1 use the same GPU"), "{error}");
            });
        }
    });

    let host = threads::single();
    let group = Communicator::new(load(), &host, gpu.stream(), timeout).unwrap();
    let len = 1000;
    let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
    let [first, second] = [0; 2].map(|_| gpu.allocate(4 * len).unwrap().unwrap());
    let mut got = vec![0f32; len];
    // Each step reads the result of the previous one, across both streams.
    gpu.copy_in(first, bytemuck::cast_slice(&values)).unwrap();
    group.all_reduce_f32(first.0, len).unwrap();
    group.join().unwrap();
    gpu.copy_out(first, bytemuck::cast_slice_mut(&mut got)).unwrap();
    assert!(got.iter().zip(&values).all(|(got, value)| *got == value + 1.0), "{:?}", &got[..8]);
    group.reduce_scatter_f32(first.0, &[len], second.0).unwrap();
    group.join().unwrap();
    gpu.copy(second, first, 4 * len).unwrap();
    gpu.zero(second, 4 * len).unwrap();
    group.all_gather_into(first.0, &[4 * len], second.0).unwrap();
    group.wait().unwrap();
    gpu.copy_out(second, bytemuck::cast_slice_mut(&mut got)).unwrap();
    assert!(got.iter().zip(&values).all(|(got, value)| *got == value + 2.0), "{:?}", &got[..8]);

    drop(group);
    let group = Communicator::new(load(), &host, gpu.stream(), timeout).unwrap();
    group.all_reduce_f32(first.0, len).unwrap();
    group.abort();
    assert!(group.wait().unwrap_err().to_string().contains("aborted"));
    drop(group);
    for at in [first, second] {
        gpu.free(at).unwrap();
    }
}
