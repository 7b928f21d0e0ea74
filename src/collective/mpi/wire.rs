//! Safe wrappers of the MPI calls that moewarden uses. All unsafe MPI code is here.
//!
//! A call needs the [`Wire`]. There is only one, and it cannot be copied, so no two threads call MPI at once:
//! `MPI_THREAD_SERIALIZED` suffices. A [`Pending`] message owns its buffer until MPI is done with it.

use std::ffi::{c_char, c_int};
use std::ptr::null_mut;

use ::mpi::ffi;

/// The result of an MPI call; the error is the library's message.
pub(super) type Result<T> = std::result::Result<T, String>;

/// The kind of a message, of which each generation has an MPI tag.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tag {
    /// Control messages, see `Message`.
    Control = 0,
    /// Chunks of vectors.
    Data = 1,
}

/// How many generations have tags: MPI guarantees tags up to 32,767.
const GENERATIONS: c_int = 1 << 14;

/// Access to MPI: exclusive, as there is one per process.
pub(super) struct Wire {
    pub rank: usize,
    pub world_size: usize,
    /// Whether any thread may call MPI, one at a time (`MPI_THREAD_SERIALIZED` or higher).
    pub any_thread: bool,
    /// How often the group was renewed.
    generation: c_int,
}

/// A message being sent or received. Dropped before it is done, it leaks its buffer, as MPI may still access it.
pub(super) struct Pending {
    bytes: Vec<u8>,
    request: ffi::MPI_Request,
    is_receive: bool,
    done: bool,
}

// SAFETY: a request is a handle that is not bound to a thread, and every call on it takes the only `Wire`.
unsafe impl Send for Pending {}

/// Initialises MPI in this process.
pub(super) fn init() -> Result<Wire> {
    let (mut before, mut level, mut rank, mut size) = (0, 0, 0, 0);
    // SAFETY: all pointers are to locals of the right type; null arguments to MPI_Init_thread mean "no command line".
    unsafe {
        check(ffi::MPI_Initialized(&mut before))?;
        if before != 0 {
            return Err("it was already initialised in this process".to_owned());
        }
        check(ffi::MPI_Init_thread(null_mut(), null_mut(), ffi::RSMPI_THREAD_MULTIPLE, &mut level))?;
        // Calls return error codes instead of ending the process.
        check(ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN))?;
        check(ffi::MPI_Comm_rank(ffi::RSMPI_COMM_WORLD, &mut rank))?;
        check(ffi::MPI_Comm_size(ffi::RSMPI_COMM_WORLD, &mut size))?;
        let any_thread = level >= ffi::RSMPI_THREAD_SERIALIZED;
        Ok(Wire { rank: rank as usize, world_size: size as usize, any_thread, generation: 0 })
    }
}

/// Whether MPI is initialised in this process and not finalized.
pub(super) fn is_running() -> bool {
    let (mut started, mut ended) = (0, 0);
    // SAFETY: both may be called at any time, by any thread.
    unsafe {
        ffi::MPI_Initialized(&mut started) == 0 && ffi::MPI_Finalized(&mut ended) == 0 && started != 0 && ended == 0
    }
}

/// Finalizes MPI. Collective: waits for all ranks.
pub(super) fn finalize() {
    // SAFETY: the caller has checked that MPI is running, and ends the process next.
    unsafe { ffi::MPI_Finalize() };
}

/// Kills the processes of all ranks.
pub(super) fn abort(code: u8) {
    // SAFETY: the caller has checked that MPI is running, and ends the process next.
    unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code.into()) };
}

impl Wire {
    fn tag(&self, tag: Tag) -> c_int {
        2 * (self.generation % GENERATIONS) + tag as c_int
    }

    /// Sends and receives by other tags from now on.
    pub fn next_tags(&mut self) {
        self.generation += 1;
    }

    pub fn send(&mut self, to: usize, tag: Tag, bytes: Vec<u8>) -> Result<Pending> {
        let mut message = Pending::new(bytes, false);
        // SAFETY: the buffer has the given length, and lives until the request is done.
        check(unsafe {
            ffi::MPI_Isend(
                message.bytes.as_ptr().cast(),
                count(message.bytes.len()),
                ffi::RSMPI_UINT8_T,
                to as c_int,
                self.tag(tag),
                ffi::RSMPI_COMM_WORLD,
                &mut message.request,
            )
        })?;
        Ok(message)
    }

    /// Receives a message of exactly `len` bytes.
    pub fn receive(&mut self, from: usize, tag: Tag, len: usize) -> Result<Pending> {
        let mut message = Pending::new(vec![0; len], true);
        // SAFETY: the buffer has the given length, and lives until the request is done.
        check(unsafe {
            ffi::MPI_Irecv(
                message.bytes.as_mut_ptr().cast(),
                count(len),
                ffi::RSMPI_UINT8_T,
                from as c_int,
                self.tag(tag),
                ffi::RSMPI_COMM_WORLD,
                &mut message.request,
            )
        })?;
        Ok(message)
    }

    /// Sender and length of a message that has arrived and is not yet received, if any.
    pub fn probe(&mut self, tag: Tag) -> Result<Option<(usize, usize)>> {
        let (mut found, mut len) = (0, 0);
        // SAFETY: a status consists of integers, so all zeros are a valid one; the pointers are to locals.
        unsafe {
            let mut status: ffi::MPI_Status = std::mem::zeroed();
            check(ffi::MPI_Iprobe(
                ffi::RSMPI_ANY_SOURCE,
                self.tag(tag),
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
    fn new(bytes: Vec<u8>, is_receive: bool) -> Self {
        // SAFETY: reads a constant of the library.
        Self { bytes, request: unsafe { ffi::RSMPI_REQUEST_NULL }, is_receive, done: false }
    }

    /// Tests whether the send or receive is complete.
    pub fn is_done(&mut self, _: &mut Wire) -> Result<bool> {
        if self.done {
            return Ok(true);
        }
        let (mut done, mut len) = (0, 0);
        // SAFETY: the request comes from a successful call and is not done; the pointers are to locals.
        unsafe {
            let mut status: ffi::MPI_Status = std::mem::zeroed();
            check(ffi::MPI_Test(&mut self.request, &mut done, &mut status))?;
            self.done = done != 0;
            if self.done && self.is_receive {
                check(ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut len))?;
                if len as usize != self.bytes.len() {
                    return Err(format!("received a message of {len} bytes, expected {}", self.bytes.len()));
                }
            }
        }
        Ok(self.done)
    }

    /// The received bytes.
    ///
    /// # Panics
    /// If the message is not done.
    pub fn into_bytes(mut self) -> Vec<u8> {
        assert!(self.done, "the message is still being sent or received");
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

/// A message length as MPI wants it.
fn count(len: usize) -> c_int {
    c_int::try_from(len).expect("a message of less than 2 GiB")
}

fn check(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let mut text = [0 as c_char; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len = 0;
    // SAFETY: the buffer has the length that MPI requires.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr(), &mut len) };
    let bytes: Vec<u8> = text.iter().take(len as usize).map(|c| *c as u8).collect();
    Err(String::from_utf8_lossy(&bytes).into_owned())
}
