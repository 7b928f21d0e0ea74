//! The outputs of the base model on the retain rows, in a folder of their own: made once, used by every later run of the same
//! model, rows and kind of device.
//!
//! `KEY/base.safetensors` holds for row i the f32 tensors `i.hidden` `[n, D]` and `i.router_logits` `[L, T, E]` (see
//! [`BaseRow`]); `KEY/manifest.json` its size and hash. KEY is a hash of all that decides the values.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::time::Duration;

use super::atomic_dir::{AtomicDir, remove};
use super::error::Error;
use super::manifest::{Manifest, ManifestEntry};
use crate::backend::{Backend, Dtype};
use crate::collective::all_ok;
use crate::exit::{Context, Result};
use crate::model::{Shard, write_header};
use crate::train::{BaseOutputs, BaseRow, Replica, RetainRows, compute_base};

const FILE: &str = "base.safetensors";
/// Hexadecimal digits of a key in the name of its folder.
const KEY_DIGITS: usize = 32;

/// Whether a folder of this name in the cache holds the outputs of one base model.
pub fn is_base_cache_folder(name: &str) -> bool {
    name.len() == KEY_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether such a folder has a file of this name.
pub fn is_base_cache_file(name: &str) -> bool {
    [FILE, Manifest::FILE].contains(&name)
}

/// Where the outputs of one base model on one set of rows are kept.
pub struct BaseCache {
    /// The folder of all of them.
    pub folder: PathBuf,
    /// A hash of everything that decides the outputs: weights, configuration, tokens, device, number format.
    pub key: blake3::Hash,
}

impl BaseCache {
    fn target(&self) -> PathBuf {
        self.folder.join(&self.key.to_hex()[..KEY_DIGITS])
    }

    /// The outputs: read from the cache, or else computed with the weights of `replica`, which must be the base model's. All
    /// ranks call it together. `damaged` is told why files that exist are not used.
    ///
    /// # Errors
    /// A file that cannot be written or read; those of the collective.
    pub fn get<B: Backend>(
        &self,
        replica: &Replica<B>,
        rows: &RetainRows<'_>,
        damaged: impl Fn(&Error),
    ) -> Result<BaseOutputs> {
        let (world, target) = (&*replica.world, self.target());
        let exists = || -> Result<bool> {
            if world.rank() != 0 || !target.exists() {
                return Ok(false);
            }
            match Manifest::verify(&target) {
                Ok(()) => Ok(true),
                Err(error) => {
                    damaged(&error);
                    remove(&target)?;
                    Ok(false)
                }
            }
        };
        let exists = all_ok(world, exists())?;
        let [exists] = replica.any([exists])?;
        if !exists {
            self.make(replica, rows)?;
        }
        all_ok(world, self.read(replica, rows).context("reading the base model's outputs on the retain rows"))
    }

    /// Computes the outputs and writes them.
    fn make<B: Backend>(&self, replica: &Replica<B>, rows: &RetainRows<'_>) -> Result<()> {
        let (world, target) = (&*replica.world, self.target());
        let begin = || -> Result<Option<(AtomicDir, BufWriter<File>)>, Error> {
            if world.rank() != 0 {
                return Ok(None);
            }
            let dir = AtomicDir::create(&target)?;
            let path = dir.path().join(FILE);
            let mut file = BufWriter::new(File::create(&path).map_err(Error::create(&path))?);
            let shapes = BaseOutputs::shapes(rows, &replica.model().config);
            let tensors: Vec<_> = shapes
                .into_iter()
                .enumerate()
                .flat_map(|(row, shapes)| names(row).into_iter().zip(shapes))
                .map(|(name, shape)| (name, Dtype::F32, shape))
                .collect();
            write_header(&mut file, &[], &tensors).map_err(Error::write(&path))?;
            Ok(Some((dir, file)))
        };
        let mut begun = all_ok(world, begin().map_err(Into::into))?;
        // A failed write must not keep this rank from the collective operations of the other rows.
        let mut written: io::Result<()> = Ok(());
        compute_base(replica, rows, |hidden, logits| {
            if let (Some((_, file)), Ok(())) = (&mut begun, &written) {
                let bytes = [hidden, logits].map(bytemuck::cast_slice::<f32, u8>);
                written = bytes.into_iter().try_for_each(|bytes| file.write_all(bytes));
            }
        })?;
        let finish = |(dir, file): (AtomicDir, BufWriter<File>)| -> Result<(), Error> {
            let path = dir.path().join(FILE);
            let sync = || file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all();
            written.and_then(|()| sync()).map_err(Error::write(&path))?;
            Manifest::new(BTreeMap::from([(FILE.to_owned(), ManifestEntry::of(&path)?)])).write(dir.path())?;
            dir.finish(true)
        };
        all_ok(world, begun.map_or(Ok(()), finish).map_err(Into::into))
    }

    /// Maps the file into memory.
    fn read<B: Backend>(&self, replica: &Replica<B>, rows: &RetainRows<'_>) -> Result<BaseOutputs, Error> {
        let path = self.target().join(FILE);
        // Network file systems show new files with a delay.
        for _ in 0..100 {
            if fs::exists(&path).is_ok_and(|exists| exists) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let shard = Shard::open(&path)?;
        let tensors: BTreeMap<&str, _> = shard.header.tensors.iter().map(|info| (&*info.name, info)).collect();
        let tensor = |name: String, shape: Vec<usize>| {
            let damaged = |message| Error::Damaged { file: path.clone(), message };
            let info = tensors.get(&*name).ok_or_else(|| damaged(format!("it has no tensor {name}")))?;
            let value = shard.value(info)?;
            match value.shape == shape && value.dtype == Dtype::F32 {
                true => Ok(value),
                false => Err(damaged(format!("{name} is {:?} {:?}, not F32 {shape:?}", value.dtype, value.shape))),
            }
        };
        let row = |(row, [hidden, logits]): (usize, [Vec<usize>; 2])| {
            let [of_hidden, of_logits] = names(row);
            Ok(BaseRow { hidden: tensor(of_hidden, hidden)?, router_logits: tensor(of_logits, logits)? })
        };
        let shapes = BaseOutputs::shapes(rows, &replica.model().config);
        Ok(BaseOutputs(shapes.into_iter().enumerate().map(row).collect::<Result<_, Error>>()?))
    }
}

fn names(row: usize) -> [String; 2] {
    ["hidden", "router_logits"].map(|part| format!("{row}.{part}"))
}
