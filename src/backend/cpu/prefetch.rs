//! Reads memory-mapped weights from the disk while the layer before is computed.
//!
//! Without it, each first use of a page waits for the disk. That is so in the first pass of a process, and in every pass where the
//! weights are larger than the memory that is left for them.

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;

use crate::backend::SharedBytes;

/// Fewer bytes are not worth a message to another thread.
const LEAST: usize = 16 << 20;
/// Bytes that are read before a newer request is looked for.
const PART: usize = 8 << 20;

/// A thread that reads what it was asked for last. It starts at the first request, and ends when this is dropped.
#[derive(Default)]
pub(super) struct Prefetch(OnceLock<Sender<Vec<SharedBytes>>>);

impl Prefetch {
    /// Reads these in their order, in place of what is left of the request before. Returns at once.
    pub(super) fn request<'b>(&self, wanted: impl Iterator<Item = &'b SharedBytes>) {
        let wanted: Vec<_> = wanted.filter(|bytes| bytes.is_mapped()).collect();
        if wanted.iter().map(|bytes| bytes.len()).sum::<usize>() >= LEAST {
            let worker = self.0.get_or_init(|| {
                let (sender, requests) = channel();
                // Without the thread, pages are read where they are used.
                let _ = thread::Builder::new().name("prefetch".into()).spawn(move || work(&requests));
                sender
            });
            let _ = worker.send(join(wanted));
        }
    }
}

/// The same bytes in the order of their files, and in as few ranges as possible.
fn join(mut wanted: Vec<&SharedBytes>) -> Vec<SharedBytes> {
    wanted.sort_by_key(|bytes| bytes.as_ptr());
    let mut ranges: Vec<SharedBytes> = Vec::new();
    for bytes in wanted {
        if !ranges.last_mut().is_some_and(|last| last.extend(bytes)) {
            ranges.push(bytes.clone());
        }
    }
    ranges
}

fn work(requests: &Receiver<Vec<SharedBytes>>) {
    let mut next = requests.recv().ok();
    while let Some(ranges) = next.take() {
        for part in ranges.iter().flat_map(parts) {
            match requests.try_recv() {
                Ok(newer) => next = Some(newer),
                Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => {
                    part.populate();
                    continue;
                }
            }
            break;
        }
        next = next.or_else(|| requests.recv().ok());
    }
}

fn parts(bytes: &SharedBytes) -> impl Iterator<Item = SharedBytes> + '_ {
    (0..bytes.len()).step_by(PART).map(|start| bytes.slice(start..bytes.len().min(start + PART)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use memmap2::Mmap;

    use super::*;

    fn mapped(len: usize) -> SharedBytes {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; len]).unwrap();
        // SAFETY: nothing else has this file.
        SharedBytes::mapped(unsafe { Mmap::map(&file) }.unwrap())
    }

    #[test]
    fn neighbours_are_read_together() {
        let (file, other) = (mapped(100), mapped(100));
        let wanted =
            [file.slice(20..50), file.slice(10..20), other.slice(50..60), file.slice(60..70), file.slice(71..72)];
        let mut lengths: Vec<usize> = join(wanted.iter().collect()).iter().map(SharedBytes::len).collect();
        lengths.sort_unstable(); // either file may be mapped before the other
        assert_eq!(lengths, [1, 10, 10, 40]);
        let parts: Vec<usize> = parts(&mapped(PART + 5)).map(|part| part.len()).collect();
        assert_eq!(parts, [PART, 5]);
    }

    #[test]
    fn the_thread_reads_the_newest_request_and_ends_with_its_owner() {
        let file = mapped(LEAST);
        let (sender, requests) = channel();
        for _ in 0..3 {
            sender.send(vec![file.clone()]).unwrap();
        }
        drop(sender);
        work(&requests);
        assert!(requests.recv().is_err(), "all requests are taken");

        let prefetch = Prefetch::default();
        prefetch.request([SharedBytes::from(vec![0; LEAST])].iter());
        prefetch.request([file.slice(1..LEAST)].iter());
        assert!(prefetch.0.get().is_none(), "owned bytes, and few bytes, are not worth a thread");
        prefetch.request([file].iter());
        assert!(prefetch.0.get().is_some());
    }
}
