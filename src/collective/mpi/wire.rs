//! The safe side of the few MPI calls in use: all unsafe code about MPI is here.
//!
//! Whoever holds the [`Wire`] may call MPI. There is one, and it is no copy, so that no two threads call at once: the level
//! `MPI_THREAD_SERIALIZED` is enough. The bytes of a message belong to it while it is [`Pending`].

use std::ffi::{c_char, c_int};
use std::ptr::null_mut;

use ::mpi::ffi;

/// What went wrong, in the library's words.
pub(super) type Result<T> = std::result::Result<T, String>;

/// Keeps two kinds of messages apart.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tag {
    /// Who is where, and what went wrong.
    Control = 1,
    /// Parts of vectors.
    Data = 2,
}

/// The right to call MPI.
pub(super) struct Wire {
    pub rank: usize,
    pub world_size: usize,
    /// Whether calls may come from any thread.
    pub any_thread: bool,
}

/// A message on its way. Given up, it leaks its bytes, which MPI may still read or write.
pub(super) struct Pending {
    bytes: Vec<u8>,
    request: ffi::MPI_Request,
    receives: bool,
    done: bool,
}

// SAFETY: a request is a handle, not bound to a thread; calls on it take the one `Wire`.
unsafe impl Send for Pending {}

/// Starts MPI in this process.
pub(super) fn init() -> Result<Wire> {
    let (mut before, mut level, mut rank, mut size) = (0, 0, 0, 0);
    // SAFETY: all pointers are to locals of the right type; null arguments to MPI_Init_thread mean "no command line".
    unsafe {
        check(ffi::MPI_Initialized(&mut before))?;
        if before != 0 {
            return Err("it was started before in this process".to_owned());
        }
        check(ffi::MPI_Init_thread(null_mut(), null_mut(), ffi::RSMPI_THREAD_MULTIPLE, &mut level))?;
        // Errors come back instead of ending the process.
        check(ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN))?;
        check(ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank))?;
        check(ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size))?;
        let any_thread = level >= ffi::RSMPI_THREAD_SERIALIZED;
        Ok(Wire { rank: rank as usize, world_size: size as usize, any_thread })
    }
}

/// Whether MPI has started in this process and not ended.
pub(super) fn is_running() -> bool {
    let (mut started, mut ended) = (0, 0);
    // SAFETY: both may be called at any time, by any thread.
    unsafe {
        ffi::MPI_Initialized(&mut started) == 0 && ffi::MPI_Finalized(&mut ended) == 0 && started != 0 && ended == 0
    }
}

/// Ends MPI in this process, together with all others.
pub(super) fn finalize() {
    // SAFETY: MPI runs, and the caller ends the process.
    unsafe { ffi::MPI_Finalize() };
}

/// Ends all processes.
pub(super) fn abort(code: u8) {
    // SAFETY: MPI runs, and the caller ends the process.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code.into()) };
}

impl Wire {
    pub fn send(&mut self, to: usize, tag: Tag, bytes: Vec<u8>) -> Result<Pending> {
        let mut message = Pending::new(bytes, false);
        // SAFETY: the buffer is as long as said, and lives until the request is done.
        check(unsafe {
            ffi::MPI_Isend(
                message.bytes.as_ptr().cast(),
                count(message.bytes.len()),
                ffi::RSMPI_UINT8_T,
                to as c_int,
                tag as c_int,
                ffi::RSMPI_COMM_WORLD,
                &mut message.request,
            )
        })?;
        Ok(message)
    }

    /// Receives a message of exactly `len` bytes.
    pub fn receive(&mut self, from: usize, tag: Tag, len: usize) -> Result<Pending> {
        let mut message = Pending::new(vec![0; len], true);
        // SAFETY: the buffer is as long as said, and lives until the request is done.
        check(unsafe {
            ffi::MPI_Irecv(
                message.bytes.as_mut_ptr().cast(),
                count(len),
                ffi::RSMPI_UINT8_T,
                from as c_int,
                tag as c_int,
                ffi::RSMPI_COMM_WORLD,
                &mut message.request,
            )
        })?;
        Ok(message)
    }

    /// The sender and length of a message that has come and is not yet received.
    pub fn probe(&mut self, tag: Tag) -> Result<Option<(usize, usize)>> {
        let (mut found, mut len) = (0, 0);
        // SAFETY: a status is plain numbers, so that zeros are one; the pointers are to locals.
        unsafe {
            let mut status: ffi::MPI_Status = std::mem::zeroed();
            check(ffi::MPI_Iprobe(
                ffi::RSMPI_ANY_SOURCE,
                tag as c_int,
                ffi::RSMPI_COMM_WORLD,
                &mut found,
                &mut status,
            ))?;
            if found == 0 {
                return Ok(None);
            }
            check(ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut len))?;
            Ok(Some((status.MPI_SOURCE as usize, len as usize)))
        }
    }
}

impl Pending {
    fn new(bytes: Vec<u8>, receives: bool) -> Self {
        // SAFETY: reads a constant of the library.
        Self { bytes, request: unsafe { ffi::RSMPI_REQUEST_NULL }, receives, done: false }
    }

    /// Whether the message has been sent or received.
    pub fn is_done(&mut self, _: &mut Wire) -> Result<bool> {
        if self.done {
            return Ok(true);
        }
        let (mut done, mut len) = (0, 0);
        // SAFETY: the request is of a call that succeeded, and is not done; the pointers are to locals.
        unsafe {
            let mut status: ffi::MPI_Status = std::mem::zeroed();
            check(ffi::MPI_Test(&mut self.request, &mut done, &mut status))?;
            self.done = done != 0;
            if self.done && self.receives {
                check(ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut len))?;
                if len as usize != self.bytes.len() {
                    return Err(format!("a message has {len} bytes, not {}", self.bytes.len()));
                }
            }
        }
        Ok(self.done)
    }

    /// The bytes of a message that is done.
    pub fn into_bytes(mut self) -> Vec<u8> {
        assert!(self.done, "the message is on its way");
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.done {
            std::mem::forget(std::mem::take(&mut self.bytes));
        }
    }
}

/// A length of a message, all of which are short.
fn count(len: usize) -> c_int {
    c_int::try_from(len).expect("a message of less than 2 GiB")
}

fn check(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let mut text = [0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len = 0;
    // SAFETY: the buffer is as long as MPI asks for.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut len) };
    let bytes: Vec<u8> = text.iter().take(len as usize).map(|c| *c as u8).collect();
    Err(String::from_utf8_lossy(&bytes).into_owned())
}
