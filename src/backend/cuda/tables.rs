//! A cache of small arrays that kernels read and that recur in every step: addresses of weights, lists of jobs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Cuda;
use super::tensor::Array;

/// Arrays on the GPU, looked up by their content.
#[derive(Default)]
pub(super) struct Tables(Mutex<HashMap<Vec<u64>, Arc<Array<u64>>>>);

/// More than all layers of a model need; beyond that, something does not recur, and the cache is cleared.
const MOST: usize = 4096;

impl Cuda {
    /// These numbers on the GPU, from the cache or copied there.
    pub(in crate::backend::cuda) fn table(&self, values: Vec<u64>) -> Arc<Array<u64>> {
        let mut tables = self.tables.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&values) {
            return table.clone();
        }
        if tables.len() >= MOST {
            tables.clear();
        }
        let table = Arc::new(self.uploaded(&values));
        tables.insert(values, table.clone());
        table
    }
}
