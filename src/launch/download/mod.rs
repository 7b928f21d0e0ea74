//! `--download`: a hub id that is not in the cache is fetched into it, before anything else of a command runs.
//!
//! The cache has the layout of `huggingface_hub`: `blobs/HASH`, links to them in `snapshots/COMMIT/`, and `refs/REVISION`, which
//! is written last, so that a model is found only when it is complete. Of several processes that have the same cache a lock makes one
//! fetch and the others wait.

mod disk;
mod error;
mod remote;

use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

pub use error::Error;

use super::env::HubAccess;
use crate::files;
use crate::model::{HubCache, HubId, INDEX, SINGLE, files_of_index};
use crate::train::StopFlag;
use crate::ui::Ui;
use remote::{Event, Listing, Remote, RemoteFile};

/// Files of a model besides its weights: those that are read, and those that an exported model keeps. Also
/// `additional_chat_templates/*.jinja`.
const BESIDE_WEIGHTS: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Between two looks at the stop flag, while nothing arrives.
const LOOK: Duration = Duration::from_millis(200);

/// Files without which no command runs.
const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];

/// What of a model a command reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Configuration, tokenizer and weights.
    Model,
    /// Configuration and tokenizer (`--init random`).
    NoWeights,
}

/// Fetches the model `name` if it is a hub id that is not, or not whole, in the cache. A folder is left alone. `stop` ends it.
///
/// # Errors
/// [`Error`]; a name that is neither is left for the command to report.
pub fn download(
    name: &str,
    wanted: Wanted,
    cache: &HubCache,
    access: HubAccess,
    stop: &StopFlag,
    ui: &Ui,
) -> Result<(), Error> {
    let Some(id) = HubId::parse(name).filter(|_| !Path::new(name).exists()) else { return Ok(()) };
    let complete = || cache.snapshot(&id).is_ok_and(|dir| is_complete(&dir, wanted));
    if complete() {
        return Ok(());
    }
    if let Some(variable) = access.offline {
        return Err(Error::Offline { id, variable, cache: cache.root.clone() });
    }
    let is_address = |text: &str| text.starts_with("http://") || text.starts_with("https://");
    if !is_address(&access.endpoint) {
        return Err(Error::Endpoint(access.endpoint));
    }
    let _lock = lock(cache, &id, stop, ui)?;
    if complete() {
        return Ok(()); // another process has fetched it
    }
    let (events, arriving) = mpsc::channel();
    let remote = Remote::new(id.clone(), cache, access.clone(), events)?;
    let (root, of) = (cache.root.join(id.folder()), id.clone());
    // Of its own, since a connection that hangs cannot be ended from outside.
    let worker = thread::spawn(move || fetch(remote, &of, &root, wanted));
    let fetched = show(&arriving, &id, &access, stop, ui)
        .and_then(|()| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    if fetched.is_err() {
        // Fails unless the folder is empty: what has arrived stays.
        _ = fs::remove_dir(cache.root.join(id.folder()));
    }
    fetched?;
    ui.line(format_args!("`{id}` is in the cache {}", cache.root.display()));
    Ok(())
}

/// Shows the progress until the worker ends, or until nothing arrives any more, or until `stop` is set.
fn show(arriving: &Receiver<Event>, id: &HubId, access: &HubAccess, stop: &StopFlag, ui: &Ui) -> Result<(), Error> {
    let mut bar = ui.bytes(0, format!("downloading {id}"));
    let mut doing = format!("`{id}`");
    let mut last = Instant::now();
    loop {
        let event = arriving.recv_timeout(LOOK.min(access.patience));
        if stop.is_set() && !matches!(event, Err(RecvTimeoutError::Disconnected)) {
            return Err(Error::Stopped { id: id.clone() });
        }
        if event.is_ok() {
            last = Instant::now();
        }
        match event {
            Ok(Event::Total(bytes)) => bar = ui.bytes(bytes, format!("downloading {id}")),
            Ok(Event::At(bytes)) => bar.set(bytes),
            Ok(Event::Doing(what)) => {
                bar.set_message(&*what);
                doing = what;
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) if last.elapsed() < access.patience => {}
            Err(RecvTimeoutError::Timeout) => {
                let (endpoint, waited) = (access.endpoint.clone(), access.patience);
                return Err(Error::Stalled { what: doing, endpoint, waited });
            }
        }
    }
}

/// Fetches the files that are missing, then writes the reference.
fn fetch(mut remote: Remote, id: &HubId, root: &Path, wanted: Wanted) -> Result<(), Error> {
    let listing = remote.listing()?;
    let lacks = |file: &str| Error::Lacks { id: id.clone(), file: file.into() };
    let find = |name: &str| listing.files.iter().find(|file| file.name == name);
    for name in NEEDED {
        find(name).ok_or_else(|| lacks(name))?;
    }
    let beside: Vec<_> = listing.files.iter().filter(|file| is_beside_weights(&file.name)).collect();
    remote.fetch(&listing.commit, &beside)?;
    if wanted == Wanted::Model {
        let weights = weights(&mut remote, &listing, root, find, lacks)?;
        remote.fetch(&listing.commit, &weights)?;
    }
    let references = root.join("refs");
    _ = fs::remove_file(references.join(&listing.commit)); // of the client, for each commit
    if id.revision != listing.commit {
        let path = references.join(&id.revision);
        let failed = |source| Error::Cache { what: "the reference".into(), path: path.clone(), source };
        fs::create_dir_all(path.parent().expect("below refs")).map_err(failed)?;
        files::write(&path, listing.commit.as_bytes()).map_err(|error| failed(std::io::Error::other(error)))?;
    }
    Ok(())
}

fn is_beside_weights(name: &str) -> bool {
    let template = name.strip_prefix("additional_chat_templates/");
    BESIDE_WEIGHTS.contains(&name) || template.is_some_and(|name| name.ends_with(".jinja") && !name.contains('/'))
}

/// The files that hold the weights; the index of shards is fetched to know them.
fn weights<'a>(
    remote: &mut Remote,
    listing: &Listing,
    root: &Path,
    find: impl Fn(&str) -> Option<&'a RemoteFile>,
    lacks: impl Fn(&str) -> Error,
) -> Result<Vec<&'a RemoteFile>, Error> {
    if let Some(single) = find(SINGLE) {
        return Ok(vec![single]);
    }
    let index = find(INDEX).ok_or_else(|| lacks(SINGLE))?;
    remote.fetch(&listing.commit, &[index])?;
    let path = root.join("snapshots").join(&listing.commit).join(INDEX);
    let shards = files_of_index(&path).map_err(|error| lacks(&format!("a usable {INDEX} ({error})")))?;
    shards.iter().map(|shard| find(shard).ok_or_else(|| lacks(shard))).collect()
}

/// Whether a snapshot has all that a command needs.
fn is_complete(dir: &Path, wanted: Wanted) -> bool {
    let has = |name: &str| dir.join(name).exists();
    let weights = || has(SINGLE) || files_of_index(&dir.join(INDEX)).is_ok_and(|shards| shards.iter().all(|f| has(f)));
    NEEDED.iter().all(|name| has(name)) && (wanted == Wanted::NoWeights || weights())
}

/// Waits for other processes that fetch the same model.
fn lock(cache: &HubCache, id: &HubId, stop: &StopFlag, ui: &Ui) -> Result<File, Error> {
    let folder = cache.root.join(".locks").join(id.folder());
    let path = folder.join("moewarden.lock");
    let failed = |source| Error::Cache { what: format!("`{id}`"), path: cache.root.clone(), source };
    fs::create_dir_all(&folder).and_then(|()| fs::create_dir_all(cache.root.join(id.folder()))).map_err(failed)?;
    let file = File::create(path).map_err(failed)?;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
            Err(TryLockError::WouldBlock) if stop.is_set() => return Err(Error::Stopped { id: id.clone() }),
            Err(TryLockError::WouldBlock) => {}
        }
        if !std::mem::replace(&mut told, true) {
            ui.line(format_args!("another process downloads `{id}`: waiting for it"));
        }
        thread::sleep(LOOK);
    }
}
