//! Loads NCCL at run time and holds its functions. cudarc's own loader does not try `libnccl.so.2`, the only name that
//! NCCL's packages install.
//!
//! Signatures follow the NCCL manual, <https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html>. The
//! constants are cudarc's, generated from nccl.h.

use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::path::{Path, PathBuf};

use cudarc::nccl::sys;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::collective::{Error, Result};

/// `ncclComm_t`.
pub(super) type Comm = *mut c_void;

/// `ncclResult_t`, as a plain integer: a newer library may return a value that is not in cudarc's enum.
pub(super) type Code = c_int;

pub(super) const SUCCESS: Code = sys::ncclResult_t::ncclSuccess as Code;
pub(super) const IN_PROGRESS: Code = sys::ncclResult_t::ncclInProgress as Code;
pub(super) const BYTE: c_int = sys::ncclDataType_t::ncclUint8 as c_int;
pub(super) const F32: c_int = sys::ncclDataType_t::ncclFloat32 as c_int;
pub(super) const SUM: c_int = sys::ncclRedOp_t::ncclSum as c_int;

/// `ncclUniqueId`, which identifies a communicator. Rank 0 creates it and broadcasts it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as of version 2.18. NCCL reads `size` bytes of it and uses defaults for newer fields, so it works
/// with all later versions (`parseCommConfig` in NCCL's init.cc).
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
    /// A non-blocking communicator: no call waits for other ranks. All else is as in `NCCL_CONFIG_INITIALIZER`.
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

/// The loaded NCCL library. Version and unique ids are available without a GPU.
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
    /// The last integer is the root: the rank that receives the sum.
    pub(super) reduce: unsafe extern "C" fn(Send, Receive, usize, c_int, c_int, c_int, Comm, Stream) -> Code,
    /// The last integer is the root: the rank that holds the values.
    pub(super) broadcast: unsafe extern "C" fn(Send, Receive, usize, c_int, c_int, Comm, Stream) -> Code,
}

type Version = unsafe extern "C" fn(*mut c_int) -> Code;

impl Functions {
    /// Looks up the functions, and `ncclGetVersion`. The error is the name of the first function that the library
    /// lacks.
    ///
    /// # Safety
    /// The library is NCCL.
    unsafe fn of(library: &'static Library) -> std::result::Result<(Self, Version), &'static str> {
        /// # Safety
        /// `F` is a function pointer of its C type.
        unsafe fn function<F: Copy>(library: &Library, name: &'static CStr) -> std::result::Result<F, &'static str> {
            // SAFETY: the caller's promise: `F` is the C type of the function of this name.
            let found = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
            found.map(|symbol| *symbol).map_err(|_| name.to_str().expect("names are ASCII"))
        }
        // SAFETY: the caller guarantees that the library is NCCL; the types are those of nccl.h.
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
        // SAFETY: the caller's promise.
        Ok((functions, unsafe { function(library, c"ncclGetVersion") }?))
    }
}

impl Nccl {
    /// Loads the library at `path`, which is a file or a name that the dynamic loader searches for. `rank` is named in
    /// errors.
    ///
    /// # Errors
    /// [`Error::Nccl`] if it cannot be loaded, lacks a function, or is older than 2.18.
    pub fn load(path: &Path, rank: usize) -> Result<Self> {
        let failed = |message| Error::Nccl { rank, message };
        // SAFETY: NCCL may be loaded from any thread; its initializers only set up its own state.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|e| {
            // The dynamic loader's message, which contains the path, is in the source error.
            failed(e.source().map_or_else(|| e.to_string(), ToString::to_string))
        })?;
        // Never unloaded: NCCL's threads may outlive every communicator.
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: the types are those of nccl.h.
        let loaded = unsafe { Functions::of(library) };
        let (functions, version) =
            loaded.map_err(|name| failed(format!("{} lacks {name}: NCCL 2.18 or later is needed", path.display())))?;
        let mut number = 0;
        // SAFETY: the function writes one integer.
        let code = unsafe { version(&mut number) };
        let nccl = Self { functions, version: number as u32, path: path.to_owned() };
        nccl.check(code).map_err(failed)?;
        if nccl.version < 21800 {
            return Err(failed(format!("{nccl} is too old: 2.18 or later is needed")));
        }
        Ok(nccl)
    }

    /// The version as NCCL encodes it: 23203 is 2.32.3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Creates a unique id. This opens a port of this machine, to which all ranks will connect.
    ///
    /// # Errors
    /// NCCL's message, for example if there is no network interface.
    pub fn unique_id(&self) -> std::result::Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the function writes 128 bytes.
        self.check(unsafe { (self.functions.unique_id)(&mut id) })?;
        Ok(id)
    }

    /// Turns a result code into NCCL's error message.
    pub(super) fn check(&self, code: Code) -> std::result::Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: both return strings that the library never frees; ncclGetLastError accepts a null communicator.
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

/// A fake NCCL with scripted results, for tests of the error handling.
#[cfg(test)]
pub(super) mod fake {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// How many more times `ncclCommGetAsyncError` reports `ncclInProgress`.
        pub static BUSY: Cell<u32> = const { Cell::new(0) };
        /// The result that it reports afterwards.
        pub static THEN: Cell<Code> = const { Cell::new(SUCCESS) };
        /// Number of calls of `ncclCommAbort`.
        pub static ABORTS: Cell<u32> = const { Cell::new(0) };
    }

    unsafe extern "C" fn async_error(_: Comm, code: *mut Code) -> Code {
        let busy = BUSY.get();
        BUSY.set(busy.saturating_sub(1));
        // SAFETY: the caller passes a valid pointer, as NCCL's interface demands.
        unsafe { *code = if busy > 0 { IN_PROGRESS } else { THEN.get() } };
        SUCCESS
    }

    unsafe extern "C" fn abort(_: Comm) -> Code {
        ABORTS.set(ABORTS.get() + 1);
        SUCCESS
    }

    unsafe extern "C" fn error_string(_: Code) -> *const c_char {
        c"remote process exited".as_ptr()
    }

    unsafe extern "C" fn last_error(_: Comm) -> *const c_char {
        c"".as_ptr()
    }

    unsafe extern "C" fn group() -> Code {
        SUCCESS
    }

    /// Only the functions above may be called; the others panic.
    #[allow(clippy::missing_transmute_annotations)] // the fields give the types
    pub fn nccl() -> Nccl {
        unsafe extern "C" fn not_called() {
            unreachable!("the fake NCCL does not have this function");
        }
        macro_rules! missing {
            () => {
                // SAFETY: the function takes no argument and never returns.
                unsafe { std::mem::transmute::<unsafe extern "C" fn(), _>(not_called) }
            };
        }
        let functions = Functions {
            unique_id: missing!(),
            error_string,
            last_error,
            init: missing!(),
            async_error,
            abort,
            group_start: group,
            group_end: group,
            all_reduce: missing!(),
            reduce_scatter: missing!(),
            all_gather: missing!(),
            reduce: missing!(),
            broadcast: missing!(),
        };
        Nccl { functions, version: 21800, path: "fake".into() }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn config_has_the_layout_of_ncclconfig_t() {
        type Theirs = sys::ncclConfig_t;
        assert_eq!(offset_of!(Config, magic), offset_of!(Theirs, magic));
        assert_eq!(offset_of!(Config, version), offset_of!(Theirs, version));
        assert_eq!(offset_of!(Config, blocking), offset_of!(Theirs, blocking));
        assert_eq!(offset_of!(Config, net_name), offset_of!(Theirs, netName));
        assert_eq!(offset_of!(Config, split_share), offset_of!(Theirs, splitShare));
        assert_eq!(size_of::<UniqueId>(), size_of::<sys::ncclUniqueId>());
    }
}
