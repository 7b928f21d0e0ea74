//! NCCL's functions. A table of our own, because cudarc never looks for the name `libnccl.so.2`, which is the only one that
//! NCCL's packages install.
//!
//! Function by function as in the NCCL manual, <https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html>; the
//! constants are cudarc's, made from nccl.h.

use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::path::{Path, PathBuf};

use cudarc::nccl::sys;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::collective::{Error, Result};

/// A communicator, as NCCL hands it out.
pub(super) type Comm = *mut c_void;

/// The result of a call. A plain integer: a newer library may return one that no enum of today lists.
pub(super) type Code = c_int;

pub(super) const SUCCESS: Code = sys::ncclResult_t::ncclSuccess as Code;
pub(super) const IN_PROGRESS: Code = sys::ncclResult_t::ncclInProgress as Code;
pub(super) const BYTE: c_int = sys::ncclDataType_t::ncclUint8 as c_int;
pub(super) const F32: c_int = sys::ncclDataType_t::ncclFloat32 as c_int;
pub(super) const SUM: c_int = sys::ncclRedOp_t::ncclSum as c_int;

/// What makes a group of ranks one: made by rank 0, known to all.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as of version 2.18. NCCL reads as many bytes as `size` says and takes its defaults for the rest, so that
/// this works with every version since (`parseCommConfig` in its init.cc).
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// No call waits for other ranks; everything else as NCCL likes it (`NCCL_CONFIG_INITIALIZER`).
    pub(super) fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21800,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// NCCL, loaded. Without a GPU it still tells its version and makes ids.
pub struct Nccl {
    pub(super) functions: Functions,
    version: u32,
    path: PathBuf,
}

type Send = *const c_void;
type Receive = *mut c_void;
type Stream = *mut c_void;

pub(super) struct Functions {
    unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
    last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    pub(super) init: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> Code,
    pub(super) async_error: unsafe extern "C" fn(Comm, *mut Code) -> Code,
    pub(super) abort: unsafe extern "C" fn(Comm) -> Code,
    pub(super) group_start: unsafe extern "C" fn() -> Code,
    pub(super) group_end: unsafe extern "C" fn() -> Code,
    pub(super) all_reduce: unsafe extern "C" fn(Send, Receive, usize, c_int, c_int, Comm, Stream) -> Code,
    pub(super) reduce_scatter: unsafe extern "C" fn(Send, Receive, usize, c_int, c_int, Comm, Stream) -> Code,
    pub(super) all_gather: unsafe extern "C" fn(Send, Receive, usize, c_int, Comm, Stream) -> Code,
    /// The last integer is the rank that gets the sum.
    pub(super) reduce: unsafe extern "C" fn(Send, Receive, usize, c_int, c_int, c_int, Comm, Stream) -> Code,
    /// The last integer is the rank that has the values.
    pub(super) broadcast: unsafe extern "C" fn(Send, Receive, usize, c_int, c_int, Comm, Stream) -> Code,
}

type Version = unsafe extern "C" fn(*mut c_int) -> Code;

impl Functions {
    /// The functions of a library, and the one that tells its version; or the name of the first that it lacks.
    ///
    /// # Safety
    /// The library is NCCL.
    unsafe fn of(library: &'static Library) -> std::result::Result<(Self, Version), &'static str> {
        /// # Safety
        /// `F` is a function pointer of its C type.
        unsafe fn function<F: Copy>(library: &Library, name: &'static CStr) -> std::result::Result<F, &'static str> {
            let found = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
            found.map(|symbol| *symbol).map_err(|_| name.to_str().expect("names are ASCII"))
        }
        // SAFETY: the caller's promise.
        let functions = unsafe {
            Self {
                unique_id: function(library, c"ncclGetUniqueId")?,
                error_string: function(library, c"ncclGetErrorString")?,
                last_error: function(library, c"ncclGetLastError")?,
                init: function(library, c"ncclCommInitRankConfig")?,
                async_error: function(library, c"ncclCommGetAsyncError")?,
                abort: function(library, c"ncclCommAbort")?,
                group_start: function(library, c"ncclGroupStart")?,
                group_end: function(library, c"ncclGroupEnd")?,
                all_reduce: function(library, c"ncclAllReduce")?,
                reduce_scatter: function(library, c"ncclReduceScatter")?,
                all_gather: function(library, c"ncclAllGather")?,
                reduce: function(library, c"ncclReduce")?,
                broadcast: function(library, c"ncclBroadcast")?,
            }
        };
        Ok((functions, unsafe { function(library, c"ncclGetVersion") }?))
    }
}

impl Nccl {
    /// Loads this file, or what the loader finds under this name, on `rank`.
    ///
    /// # Errors
    /// [`Error::Nccl`]: it cannot be loaded, or lacks a function.
    pub fn load(path: &Path, rank: usize) -> Result<Self> {
        let failed = |message| Error::Nccl { rank, message };
        // SAFETY: NCCL may be loaded from any thread; its initializers only set up its own state.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| {
            // The loader's words, with the path, are one level down.
            failed(e.source().map_or_else(|| e.to_string(), ToString::to_string))
        })?;
        // To the end of the process: its threads may outlive every communicator.
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: the types are those of nccl.h.
        let loaded = unsafe { Functions::of(library) };
        let (functions, version) =
            loaded.map_err(|name| failed(format!("{} lacks {name}: NCCL 2.18 or later is needed", path.display())))?;
        let mut number = 0;
        // SAFETY: it writes an integer.
        let code = unsafe { version(&mut number) };
        let nccl = Self { functions, version: number as u32, path: path.to_owned() };
        nccl.check(code).map_err(failed)?;
        if nccl.version < 21800 {
            return Err(failed(format!("{nccl} is too old: 2.18 or later is needed")));
        }
        Ok(nccl)
    }

    /// 23203 for 2.32.3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// A new id. It opens a port, at which the ranks will find each other.
    ///
    /// # Errors
    /// NCCL's, in its words; there may be no network interface.
    pub fn unique_id(&self) -> std::result::Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes 128 bytes.
        self.check(unsafe { (self.functions.unique_id)(&mut id) })?;
        Ok(id)
    }

    /// NCCL's words for what is not success.
    pub(super) fn check(&self, code: Code) -> std::result::Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: both return strings of the library that stay; a communicator is not needed.
        let [what, last] = unsafe {
            [(self.functions.error_string)(code), (self.functions.last_error)(std::ptr::null_mut())].map(|text| {
                if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
            })
        };
        Err(if last.is_empty() { what } else { format!("{what}: {}", last.trim_end()) })
    }
}

impl fmt::Display for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = self.version;
        write!(f, "NCCL {}.{}.{} ({})", v / 10000, v / 100 % 100, v % 100, self.path.display())
    }
}

/// A stand-in that answers as it is told, for tests of what is made of the answers.
#[cfg(test)]
pub(super) mod fake {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// How often `ncclCommGetAsyncError` still says that the work goes on.
        pub static BUSY: Cell<u32> = const { Cell::new(0) };
        /// What it says then.
        pub static THEN: Cell<Code> = const { Cell::new(SUCCESS) };
        /// Calls of `ncclCommAbort`.
        pub static ABORTS: Cell<u32> = const { Cell::new(0) };
    }

    unsafe extern "C" fn async_error(_: Comm, code: *mut Code) -> Code {
        let busy = BUSY.get();
        BUSY.set(busy.saturating_sub(1));
        unsafe { *code = if busy > 0 { IN_PROGRESS } else { THEN.get() } };
        SUCCESS
    }

    unsafe extern "C" fn abort(_: Comm) -> Code {
        ABORTS.set(ABORTS.get() + 1);
        SUCCESS
    }

    unsafe extern "C" fn words(_: Code) -> *const c_char {
        c"remote process exited".as_ptr()
    }

    unsafe extern "C" fn no_words(_: Comm) -> *const c_char {
        c"".as_ptr()
    }

    unsafe extern "C" fn group() -> Code {
        SUCCESS
    }

    /// Only the functions above may be called.
    #[allow(clippy::missing_transmute_annotations)] // the table says the types
    pub fn nccl() -> Nccl {
        unsafe extern "C" fn not_called() {
            unreachable!("the stand-in has no such function");
        }
        macro_rules! none {
            () => {
                // SAFETY: it takes no argument and never returns.
                unsafe { std::mem::transmute::<unsafe extern "C" fn(), _>(not_called) }
            };
        }
        let functions = Functions {
            unique_id: none!(),
            error_string: words,
            last_error: no_words,
            init: none!(),
            async_error,
            abort,
            group_start: group,
            group_end: group,
            all_reduce: none!(),
            reduce_scatter: none!(),
            all_gather: none!(),
            reduce: none!(),
            broadcast: none!(),
        };
        Nccl { functions, version: 21800, path: "stand-in".into() }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_configuration_is_the_beginning_of_nccls_own() {
        type Theirs = sys::ncclConfig_t;
        assert_eq!(offset_of!(Config, magic), offset_of!(Theirs, magic));
        assert_eq!(offset_of!(Config, version), offset_of!(Theirs, version));
        assert_eq!(offset_of!(Config, blocking), offset_of!(Theirs, blocking));
        assert_eq!(offset_of!(Config, net_name), offset_of!(Theirs, netName));
        assert_eq!(offset_of!(Config, split_share), offset_of!(Theirs, splitShare));
        assert_eq!(size_of::<UniqueId>(), size_of::<sys::ncclUniqueId>());
    }
}
