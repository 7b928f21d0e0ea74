//! A checkpoint's weights: memory-mapped safetensors files whose headers are validated before a tensor is read.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;

use super::folder;
use super::json::Members;
use super::safetensors::{Header, HeaderError, StoredDtype, TensorInfo};
use crate::backend::{HostTensor, SharedBytes};
use crate::exit::{self, Coded};
use crate::input::{self, Format};
use crate::quote::quote;

/// The weights of a model in one file.
pub const SINGLE: &str = "model.safetensors";
/// The file that names the shards of a model.
pub const INDEX: &str = "model.safetensors.index.json";

/// Bytes at the start of a file by which its format is recognised.
const HEAD: usize = 4096;

/// Why a checkpoint's weights cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum Error {
    #[error("{0} is not a folder")]
    NoFolder(PathBuf),
    #[error("{dir} holds neither {SINGLE} nor {INDEX}; {instead}")]
    NoWeights { dir: PathBuf, instead: String },
    #[error("{dir}: {message}")]
    Adapter { dir: PathBuf, message: String },
    #[error(
        "{0} is a pickle file, which can run code when it is loaded, so moewarden does not load it. Convert it with: \
         python -c \"from transformers import AutoModelForCausalLM as M; \
         M.from_pretrained('FOLDER', dtype='auto').save_pretrained('NEW_FOLDER')\", \
         then copy the tokenizer files into NEW_FOLDER"
    )]
    Pickle(PathBuf),
    #[error(
        "{0} is a pickle file, which can run code when it is loaded, so moewarden does not load it, nor does transformers by this name: \
         load it with the program that wrote it, where you trust it, and save the model by save_pretrained(NEW_FOLDER)"
    )]
    OtherPickle(PathBuf),
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {reason}")]
    Header { path: PathBuf, reason: HeaderError },
    #[error("{path}: {message}")]
    NotSafetensors { path: PathBuf, message: String },
    #[error("{path}: {message}")]
    Index { path: PathBuf, message: String },
    #[error(
        "{index}: the file of tensor {} is {}, which is not a plain file name, or a path below the folder, ending in .safetensors", quote(.tensor), quote(.file)
    )]
    NotAFileName { index: PathBuf, tensor: String, file: String },
    #[error("{index}: the shard {file} does not exist; is the download complete?")]
    MissingShard { index: PathBuf, file: String },
    #[error("tensor {} is in both {first} and {second}", quote(.tensor))]
    InTwoShards { tensor: String, first: String, second: String },
    #[error(
        "{path} is a symbolic link to {target}, outside the checkpoint and its cache; replace the link by the file"
    )]
    LinkOutside { path: PathBuf, target: PathBuf },
    #[error(
        "{path}: tensor {} is stored as {dtype}; moewarden reads F32, F16 and BF16: convert the model, such as by model.to(torch.bfloat16).save_pretrained(FOLDER)", quote(.tensor)
    )]
    NotFloat { path: PathBuf, tensor: String, dtype: StoredDtype },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::NoFolder(_) | Error::NoWeights { .. } => exit::NO_INPUT,
            Error::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => exit::NO_INPUT,
            Error::Read { .. } => exit::IO,
            _ => exit::DATA,
        }
    }
}

/// One memory-mapped safetensors file.
pub struct Shard {
    /// File name in the checkpoint's folder, or its path below it with `/`.
    pub file: String,
    /// Its validated header.
    pub header: Header,
    bytes: SharedBytes,
}

impl Shard {
    /// Maps a file and validates its header.
    ///
    /// # Errors
    /// A file that cannot be read, or an invalid header.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read { path: path.into(), source };
        let file = input::open(path).map_err(read)?;
        // SAFETY: the bytes must not change while they are mapped. A program cannot enforce that on other processes, but
        // moewarden and the hub's tools write to a temporary file and rename it, so a visible file does not change.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let header = Header::parse(&map).map_err(|reason| match input::what_it_is(&map[..map.len().min(HEAD)]) {
            // A pointer, a web page, a packed file or nothing in the file's place says more than its first bytes as a length.
            Some(message)
                if map.first().is_some_and(u8::is_ascii_graphic)
                    || input::recognise(&map[..map.len().min(HEAD)]).is_some_and(Format::is_compressed)
                    || !map.is_empty() && map.iter().all(|b| *b == 0) =>
            {
                Error::NotSafetensors { path: path.into(), message }
            }
            _ => Error::Header { path: path.into(), reason },
        })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { file: name, header, bytes: SharedBytes::mapped(map) })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A tensor's value; it shares the mapped memory.
    ///
    /// # Errors
    /// A number format other than F32, F16 and BF16.
    pub fn value(&self, tensor: &TensorInfo) -> Result<HostTensor, Error> {
        let dtype = tensor.dtype.float().ok_or_else(|| Error::NotFloat {
            path: self.file.clone().into(),
            tensor: tensor.name.clone(),
            dtype: tensor.dtype,
        })?;
        Ok(HostTensor::new(dtype, tensor.shape.clone(), self.bytes.slice(tensor.file_range.clone())))
    }
}

/// All weights of a model as stored on disk.
pub struct Checkpoint {
    dir: PathBuf,
    sharded: bool,
    shards: Vec<Shard>,
    /// Tensor name → (shard, index in its header).
    index: HashMap<String, (usize, usize)>,
    /// Tensors that the index file lists and no shard holds, with the file it names.
    absent: HashMap<String, String>,
}

impl Checkpoint {
    /// Maps the weights of the model in this folder: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Weights that are missing or pickled, an adapter beside them, files that violate the format or contradict each other,
    /// symbolic links out of the checkpoint. Each error names the file and the tensor.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        if !dir.is_dir() {
            return Err(Error::NoFolder(dir.into()));
        }
        if let Some(message) = folder::adapter_beside_model(dir).filter(|_| has_weights(dir)) {
            return Err(Error::Adapter { dir: dir.into(), message });
        }
        let index = dir.join(INDEX);
        let sharded = !input::is_there(&dir.join(SINGLE));
        let (files, weight_map) = match sharded {
            false => (vec![SINGLE.to_string()], None),
            true if input::is_there(&index) => {
                let weight_map = read_index(&safe_file(dir, INDEX)?)?;
                (files_of(&weight_map), Some(weight_map))
            }
            true => return Err(no_weights(dir)),
        };

        let (shards, index_map, absent) = (Vec::new(), HashMap::new(), HashMap::new());
        let mut checkpoint = Self { dir: dir.into(), sharded, shards, index: index_map, absent };
        for file in files {
            if fs::symlink_metadata(dir.join(&file)).is_err() {
                return Err(Error::MissingShard { index, file });
            }
            let mut shard = Shard::open(&safe_file(dir, &file)?)?;
            shard.file = file; // the name of a symbolic link, not of its target
            checkpoint.add(shard)?;
        }
        // As for transformers, the index says which files are shards, and their headers say what they hold.
        let listed = weight_map.into_iter().flatten();
        checkpoint.absent = listed.filter(|(tensor, _)| !checkpoint.index.contains_key(tensor)).collect();
        Ok(checkpoint)
    }

    /// The folder it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Name of the index file, if the weights are sharded.
    pub fn index_file(&self) -> Option<&'static str> {
        self.sharded.then_some(INDEX)
    }

    /// The files, sorted by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// All tensors with their files: files sorted by name, tensors in the order of the header.
    pub fn tensors(&self) -> impl Iterator<Item = (&Shard, &TensorInfo)> {
        self.shards.iter().flat_map(|shard| shard.header.tensors.iter().map(move |tensor| (shard, tensor)))
    }

    /// The tensor with this name and the file that holds it.
    pub fn get(&self, name: &str) -> Option<(&Shard, &TensorInfo)> {
        let &(shard, tensor) = self.index.get(name)?;
        let shard = &self.shards[shard];
        Some((shard, &shard.header.tensors[tensor]))
    }

    /// The file that the index names for a tensor that no shard holds.
    pub(super) fn absent(&self, name: &str) -> Option<&str> {
        self.absent.get(name).map(String::as_str)
    }

    /// Files with weights in the folder that are not part of this model: neither read nor exported.
    pub fn unread_files(&self) -> Vec<String> {
        folder::unread_weights(&self.dir, |name| self.shards.iter().any(|shard| shard.file == name))
    }

    /// Index in [`Self::shards`] of the file that holds the tensor with this name.
    pub fn shard_of(&self, name: &str) -> Option<usize> {
        self.index.get(name).map(|&(shard, _)| shard)
    }

    /// Hash of file names and headers: all names, shapes, number formats and offsets, but no weights.
    pub fn layout_hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for shard in &self.shards {
            hasher.update(&(shard.file.len() as u64).to_le_bytes()).update(shard.file.as_bytes());
            hasher.update(&shard.bytes()[..shard.header.len]); // begins with its length
        }
        hasher.finalize()
    }

    fn add(&mut self, shard: Shard) -> Result<(), Error> {
        for (i, tensor) in shard.header.tensors.iter().enumerate() {
            if let Some((other, _)) = self.index.insert(tensor.name.clone(), (self.shards.len(), i)) {
                let first = self.shards[other].file.clone();
                return Err(Error::InTwoShards { tensor: tensor.name.clone(), first, second: shard.file });
            }
        }
        self.shards.push(shard);
        Ok(())
    }
}

/// `weight_map` of the index file: tensor → file.
fn read_index(path: &Path) -> Result<Vec<(String, String)>, Error> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Members<String>,
    }
    let bytes = input::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let text = input::without_mark(&bytes);
    let index: Index = serde_json::from_slice(text).map_err(|e| {
        let message = format!("it is not an index of shards: {}", input::not_json(text, &e));
        Error::Index { path: path.into(), message }
    })?;
    if index.weight_map.0.is_empty() {
        return Err(Error::Index { path: path.into(), message: "its weight_map is empty".into() });
    }
    let file = |(tensor, file): (String, String)| match relative(&file).filter(|file| file.ends_with(".safetensors")) {
        Some(file) => Ok((tensor, file)),
        None => Err(Error::NotAFileName { index: path.into(), tensor, file }),
    };
    index.weight_map.0.into_iter().map(file).collect()
}

/// The files that the index file at `path` names, sorted.
///
/// # Errors
/// A file that cannot be read or is no index, and a name that is not one of a file beside it.
pub fn files_of_index(path: &Path) -> Result<Vec<String>, Error> {
    Ok(files_of(&read_index(path)?))
}

/// The distinct file names of an index, sorted.
fn files_of(weight_map: &[(String, String)]) -> Vec<String> {
    let files: std::collections::BTreeSet<_> = weight_map.iter().map(|(_, file)| file.clone()).collect();
    files.into_iter().collect()
}

/// A file name of the index, which becomes part of a path, for reading and for export: without `./`; `None` if it leads out of the
/// folder, is hidden, or is no path on any system.
fn relative(file: &str) -> Option<String> {
    let parts: Vec<&str> = file.split('/').filter(|part| *part != ".").collect();
    let plain = |part: &&str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', ':', '\0']);
    (!parts.is_empty() && parts.iter().all(plain)).then(|| parts.join("/"))
}

/// The path of a file of the model in `dir`, with symbolic links resolved. A link may point into the folder itself or, as in
/// the hub's cache (`snapshots/COMMIT/file` → `blobs/HASH`), to the `blobs` of the same model.
///
/// # Errors
/// A file that does not exist, and a link to any other target.
pub fn safe_file(dir: &Path, file: impl AsRef<Path>) -> Result<PathBuf, Error> {
    let path = dir.join(file.as_ref());
    let real = |path: &Path| {
        let failed = |e| Error::Read { path: path.into(), source: input::dangling(path).unwrap_or(e) };
        path.canonicalize().map_err(failed)
    };
    let (dir, target) = (real(dir)?, real(&path)?);
    let snapshots = dir.parent().filter(|parent| parent.ends_with("snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|model| model.join("blobs"));
    if target.starts_with(&dir) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        Ok(target)
    } else {
        Err(Error::LinkOutside { path, target })
    }
}

/// Whether the folder holds weights that would be read.
fn has_weights(dir: &Path) -> bool {
    [SINGLE, INDEX].iter().any(|name| dir.join(name).exists())
}

/// The error for a folder without safetensors: it names what there is instead.
fn no_weights(dir: &Path) -> Error {
    let pickle = |name: &String| {
        let state =
            ["training_args", "optimizer", "scheduler", "rng_state"].iter().any(|state| name.starts_with(state));
        !state && [".bin", ".pt", ".pth", ".ckpt"].iter().any(|ending| name.ends_with(ending))
    };
    if let Some(instead) = folder::not_a_model(dir) {
        return Error::NoWeights { dir: dir.into(), instead };
    }
    if let Some(pickle) = folder::unread_weights(dir, |_| false).into_iter().find(pickle) {
        return if pickle.starts_with("pytorch_model") { Error::Pickle } else { Error::OtherPickle }(dir.join(pickle));
    }
    let instead = "to measure memory and speed without weights, run `train` or `identify` with --init random".into();
    Error::NoWeights { dir: dir.into(), instead }
}
