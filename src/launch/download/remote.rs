//! The hub: what a model consists of there, and its files into the cache.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use super::disk::{content_hash, free_space};
use super::error::{Error, Request};
use crate::launch::env::HubAccess;
use crate::model::{HubCache, HubId, is_hash};

/// Attempts to continue a file whose connection broke, before the command ends.
const RETRIES: usize = 4;

/// A file of a model on the hub.
#[derive(Debug, Clone, Deserialize)]
pub struct RemoteFile {
    /// Its path in the repository.
    #[serde(rename = "rfilename")]
    pub name: String,
    /// Bytes.
    #[serde(default)]
    pub size: u64,
    /// Git's hash of its content.
    #[serde(rename = "blobId", default)]
    blob: String,
    #[serde(default)]
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: String,
}

impl RemoteFile {
    /// The name of its content in the cache, and whether that is a SHA-256.
    fn hash(&self) -> (&str, bool) {
        self.lfs.as_ref().map_or((&self.blob, false), |lfs| (&lfs.sha256, true))
    }
}

/// What a revision of a model consists of.
#[derive(Debug, Deserialize)]
pub struct Listing {
    /// The commit.
    #[serde(rename = "sha")]
    pub commit: String,
    /// All files.
    #[serde(rename = "siblings")]
    pub files: Vec<RemoteFile>,
}

/// What the download tells the thread that shows it.
pub enum Event {
    /// So many bytes of the model's files are there or will be fetched in all.
    Total(u64),
    /// So many bytes are there now.
    At(u64),
    /// This is being done now.
    Doing(String),
}

/// A model on the hub, and its folder in the cache.
pub struct Remote {
    id: HubId,
    access: HubAccess,
    cache: PathBuf,
    api: Api,
    events: Sender<Event>,
    /// Bytes of the files before the present one.
    before: u64,
}

impl Remote {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// [`Error::NotAHub`]: the client cannot be set up.
    pub fn new(id: HubId, cache: &HubCache, access: HubAccess, events: Sender<Event>) -> Result<Self, Error> {
        let api = ApiBuilder::from_cache(Cache::new(cache.root.clone()))
            .with_endpoint(access.endpoint.clone())
            .with_token(access.token.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .with_user_agent("moewarden", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| {
                let (what, endpoint) = (format!("`{id}`"), access.endpoint.clone());
                Error::NotAHub { what, endpoint, cause: error.to_string() }
            })?;
        let folder = cache.root.join(id.folder());
        Ok(Self { id, access, cache: folder, api, events, before: 0 })
    }

    /// The revision's commit and files.
    ///
    /// # Errors
    /// A model or revision that does not exist or that this user may not read; no network.
    pub fn listing(&self) -> Result<Listing, Error> {
        let what = format!("the list of files of `{}`", self.id);
        self.doing(&what);
        let repo = self.api.repo(self.repo(&self.id.revision));
        // `blobs`: with sizes and hashes, which the client's own list lacks.
        let answer = repo.info_request().query("blobs", "true").call();
        let listing: Listing = answer
            .and_then(|mut answer| answer.body_mut().read_json())
            .map_err(|error| self.request(what.clone()).refused(error))?;
        // Both become parts of paths.
        if !is_hash(&listing.commit) || listing.files.iter().any(|file| !is_hash(file.hash().0)) {
            let cause = "a commit or a hash in it is not hexadecimal".into();
            return Err(Error::NotAHub { what, endpoint: self.access.endpoint.clone(), cause });
        }
        Ok(listing)
    }

    /// Brings these files of a commit into the cache, and leaves those that are there. Their names are plain.
    ///
    /// # Errors
    /// No network, no room, a file that arrives damaged.
    pub fn fetch(&mut self, commit: &str, files: &[&RemoteFile]) -> Result<(), Error> {
        let all: u64 = files.iter().map(|file| file.size).sum();
        self.send(Event::Total(self.before + all));
        self.check_room(files)?;
        for file in files {
            self.fetch_file(commit, file)?;
            self.before += file.size;
            self.send(Event::At(self.before));
        }
        Ok(())
    }

    fn fetch_file(&self, commit: &str, file: &RemoteFile) -> Result<(), Error> {
        let pointer = self.cache.join("snapshots").join(commit).join(&file.name);
        let blob = self.blob(file);
        if pointer.exists() {
            return Ok(());
        }
        let (what, depth) = (self.file(file), file.name.matches('/').count());
        let written = |source| self.request(what.clone()).interrupted(source);
        if blob.metadata().is_ok_and(|there| there.len() == file.size) {
            // Of another commit.
            return link(&blob, &pointer, depth).map_err(written);
        }
        self.doing(&file.name);
        let part = part_of(&blob);
        let arrived = || part.metadata().map_or(0, |part| part.len());
        if arrived() > file.size {
            fs::remove_file(&part).map_err(written)?;
        }
        if arrived() < file.size {
            let progress = Arrived { events: self.events.clone(), before: self.before, here: 0 };
            match self.api.repo(self.repo(commit)).download_with_progress(&file.name, progress) {
                Ok(_) => return self.verify(file, &pointer),
                Err(error) if arrived() != file.size => return Err(self.client_failed(&what, error)),
                // The client fails after its last attempt even if that succeeded.
                Err(_) => {}
            }
        }
        fs::rename(&part, &blob).and_then(|()| link(&blob, &pointer, depth)).map_err(written)?;
        self.verify(file, &pointer)
    }

    /// Compares a fetched file with the hub's size and hash, and deletes it if it differs.
    fn verify(&self, file: &RemoteFile, pointer: &Path) -> Result<(), Error> {
        let what = self.file(file);
        let failed = |source| self.request(what.clone()).interrupted(source);
        // Servers other than the hub may name it by another hash.
        let blob = pointer.canonicalize().map_err(failed)?;
        let size = blob.metadata().map_err(failed)?.len();
        let (hash, sha256) = file.hash();
        let cause = if size == file.size {
            let here = self.before + size;
            let found = content_hash(&blob, sha256, |_| self.send(Event::At(here))).map_err(failed)?;
            if found == hash {
                return Ok(());
            }
            format!("its hash is {found} instead of {hash}")
        } else {
            format!("it has {size} bytes instead of {}", file.size)
        };
        for path in [pointer, &blob] {
            _ = fs::remove_file(path);
        }
        Err(Error::Torn { what, endpoint: self.access.endpoint.clone(), cause })
    }

    /// Checks that what is still to be fetched fits on the disk.
    fn check_room(&self, files: &[&RemoteFile]) -> Result<(), Error> {
        let there = |path: &Path| path.metadata().map_or(0, |file| file.len());
        let left = |file: &&RemoteFile| {
            let blob = self.blob(file);
            file.size.saturating_sub(there(&blob).max(there(&part_of(&blob))))
        };
        let needed = files.iter().map(left).sum();
        match free_space(&self.cache) {
            Some(free) if free < needed => {
                let what = format!("`{}`", self.id);
                Err(Error::DiskFull { what, path: self.cache.clone(), needed: Some(needed), free })
            }
            _ => Ok(()),
        }
    }

    fn client_failed(&self, what: &str, error: ApiError) -> Error {
        self.request(what.to_owned()).failed(error)
    }

    fn request(&self, what: String) -> Request<'_> {
        let cache = self.cache.clone();
        Request { id: &self.id, what, endpoint: &self.access.endpoint, cache, with_token: self.access.token.is_some() }
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.id.clone(), RepoType::Model, revision.to_owned())
    }

    fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.cache.join("blobs").join(file.hash().0)
    }

    fn file(&self, file: &RemoteFile) -> String {
        format!("{} of `{}`", file.name, self.id)
    }

    fn doing(&self, what: &str) {
        self.send(Event::Doing(what.to_owned()));
    }

    /// The receiver may have given up.
    fn send(&self, event: Event) {
        _ = self.events.send(event);
    }
}

/// The file in which the client collects a blob.
fn part_of(blob: &Path) -> PathBuf {
    blob.with_extension("part")
}

/// Makes `snapshots/COMMIT/NAME` a link to the blob, as `huggingface_hub` does. `depth`: the folders in the name.
fn link(blob: &Path, pointer: &Path, depth: usize) -> io::Result<()> {
    fs::create_dir_all(pointer.parent().expect("a file of a snapshot"))?;
    _ = fs::remove_file(pointer); // a link to a deleted blob
    let name = blob.file_name().expect("a blob");
    std::os::unix::fs::symlink(Path::new(&"../".repeat(depth + 2)).join("blobs").join(name), pointer)
}

/// Reports the bytes of a file that have arrived; the client starts anew after an interruption.
struct Arrived {
    events: Sender<Event>,
    before: u64,
    here: u64,
}

impl Progress for Arrived {
    fn init(&mut self, _: usize, _: &str) {
        self.here = 0;
    }

    fn update(&mut self, size: usize) {
        self.here += size as u64;
        _ = self.events.send(Event::At(self.before + self.here));
    }

    fn finish(&mut self) {}
}
